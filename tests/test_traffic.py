"""The bytes that a kernel moves are those that its head and CASES say: counted where each load and store is seen.

In Triton's interpreter every access is counted (in the process that test_interpreter.py starts), in the CUDA emulator those by
load() and store(). What may be read again from a cache, a row of RoPE's tables by other lanes, is allowed on top.
"""

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from fastprimer.backends import use_backend
from fastprimer.cases import Inputs, loss_case, rms_norm_case, rope_case, swiglu_case

CASES = {
    rms_norm_case("rows", 256, 512, weight=False): 0.0,
    rms_norm_case("residual", 64, 1024, weight=False, residual=True): 0.0,
    rope_case("half-split", (1, 256), 12, 4, 64, 64, P=256): 0.2,
    rope_case("interleaved", (1, 256), 12, 4, 64, 32, P=300, interleaved=True): 0.2,
    rope_case("positions", (2, 128), 12, 4, 64, 64, P=256, positions=lambda p: p): 0.2,
    swiglu_case("separate", 64, 1024): 0.0,
    swiglu_case("packed", 64, 1024, layout="packed", activation="gpt_oss"): 0.0,
    swiglu_case("views", 64, 1024, layout="views"): 0.0,
    loss_case("cross_entropy", "whole", 4, 8192, reduction="none"): 0.005,
    loss_case("cross_entropy", "odd", 4, 8191, reduction="none", softcap=5.0, z_loss=0.1): 0.005,
}
"""{case: the share of its bytes that may be read once more, or stand beside the rows: a token's target, its loss}"""


def counter(backend):
    if backend == "triton":
        interpreter = pytest.importorskip("fastprimer.interpreter")

        def count(call):
            with interpreter.counted_traffic() as traffic:
                result = call()
            return result, traffic.bytes

        return count

    def count(call):
        torch.ops.fastprimer_emulated.take_traffic()
        result = call()
        return result, torch.ops.fastprimer_emulated.take_traffic()

    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_moved(case, backend, dtype):
    if torch.cuda.is_available():
        pytest.skip("nobody counts on a GPU")
    device = device_or_skip(case.op, backend)
    arguments = case.arguments(Inputs(dtype, device, 0))
    work = case.work(arguments)
    count = counter(backend)
    with use_backend(backend):
        outputs, forward = count(lambda: getattr(fp, case.op)(**arguments))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        dys = [torch.randn_like(o) for o in outputs]
        _, backward = count(lambda: torch.autograd.grad(outputs, leaves, dys))
    # A single number of a row (rstd, a position) is no vector, and not counted in the emulator: 4 or 8 bytes a row.
    single = 0 if backend == "triton" else 8 * arguments.get("x", arguments.get("q", torch.empty(0))).shape[:2].numel()
    for name, moved, least in (("forward", forward, work.bytes_forward), ("backward", backward, work.bytes_backward)):
        assert least - single <= moved <= (1 + CASES[case]) * least, f"{name}: {moved} bytes moved, CASES says {least}"
