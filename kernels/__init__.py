"""The Triton backend: one module per operation, named like its chapter in fastprimer/ops.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, in Triton's interpreter as fastprimer/interpreter.py mends it.
"""

import triton

if triton.knobs.runtime.interpret:
    from fastprimer import interpreter

    interpreter.install()
