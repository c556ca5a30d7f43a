"""Large CPU tensors without page faults: let the C library keep what is freed.

glibc returns every freed block of more than some megabytes to the system, and the next tensor of that size comes page by page,
each cleared and mapped when it is first written. For a memory-bound operation that takes several times longer than the work
itself, in plain torch as in fastprimer (benchmarks/NOTES.md). Deep-learning frameworks cache freed GPU memory for the same reason.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """From now on, for the whole process, freed memory stays with the process for the next allocation.

    A training loop, which allocates the same sizes in every step, wins; a process that needs its peak only once keeps it.
    `fastprimer train` and `fastprimer bench` do this; `import fastprimer` never does.

    Returns:
        Whether the C library agreed: True with glibc, False with any other (macOS, musl), where nothing changes.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018  # musl has a libc.so.6 on some systems, but no such function
        return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, NEVER))
    except (OSError, AttributeError):
        return False
