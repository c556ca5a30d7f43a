"""Large CPU tensors without page faults: let the C library keep what is freed.

glibc returns every freed block of more than some megabytes to the system, and the next tensor of that size comes page by page,
each cleared and mapped when it is first written. For a memory-bound operation that takes several times longer than the work
itself, in plain torch as in fastprimer (benchmarks/NOTES.md). Deep-learning frameworks cache freed GPU memory for the same reason.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
NEVER = -1
MMAP_MAX = 65536  # glibc's own
MMAP_THRESHOLD_MAX = 32 << 20  # where glibc's own threshold ends after the first large tensors; it trims from twice that on


def keep_freed_memory() -> bool:
    """From now on, for the whole process, freed memory stays with the process for the next allocation.

    A training loop, which allocates the same sizes in every step, benefits; a process that needs its peak only once goes on
    holding it.
    `fastprimer train`, `bench` and `scaling` do this; `import fastprimer` never does.

    Returns:
        Whether the C library agreed: True with glibc, False with any other (macOS, musl), where nothing changes.
    """
    global _kept
    libc = _glibc()
    _kept = libc is not None and bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, NEVER))
    return _kept


def populate_kept_memory(room: int = 0) -> None:
    """Map what the main heap holds, free or not, so that the next allocations meet no page fault. Only where freed memory is kept.

    A heap that malloc_trim has emptied is mapped again bit by bit, and one whose blocks come in another order each time has holes, and
    grows, for dozens of rounds.

    Args:
        room: bytes; the heap grows first, if it has no hole of so many.
    """
    libc = _glibc()
    if libc is None or not _kept:
        return
    libc.free(libc.malloc(room))
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_POPULATE_WRITE)  # before Linux 5.14 in vain


MADV_POPULATE_WRITE = 23

_kept = False
"""Whether the process keeps its freed memory: malloc cannot be asked."""


def extra_resident_bytes(call: Callable, stage: Callable[[Callable], Callable[[], object]] = lambda call: call) -> int | None:
    """What one call needs at most beyond what is there before it, its results included; None where that cannot be told.

    The highest resident set (VmHWM of Linux, begun anew for the call) less what is resident before. Freed memory is returned to the system
    first, so that all that the call touches shows. The call runs in a new thread whose heap has no holes, and every block from 64 KiB on
    is a mapping of its own, so that what is freed is gone at once: between the holes of a used heap the same call takes half as much more
    or less. It runs twice there, and the second run is measured: libraries generate code and keep scratch memory for each thread.
    Both times `stage(call)` is what runs; what staging takes is not counted.
    """
    libc = _glibc()
    if libc is None:
        return None

    def measured() -> int:
        with _no_holes(libc):
            stage(call)()
            ready = stage(call)
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            before = _status("VmRSS:")
            result = ready()
            peak = _status("VmHWM:")
            del result
        return max(0, peak - before)

    try:
        with _own_mappings(libc), ThreadPoolExecutor(1) as thread:
            return thread.submit(contextvars.copy_context().run, measured).result()
    except OSError:
        return None


OWN_MAPPING = 1 << 16  # from this size on glibc, when it frees a block, looks whether the end of the heap can go


@contextlib.contextmanager
def _own_mappings(libc: ctypes.CDLL) -> Iterator[None]:
    """Within the block malloc maps each block from OWN_MAPPING bytes on by itself; afterwards it does as after large tensors."""
    libc.mallopt(M_MMAP_MAX, 1 << 30)
    libc.mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_MAX)
        if _kept:
            keep_freed_memory()
        else:
            libc.mallopt(M_MMAP_MAX, MMAP_MAX)
            libc.mallopt(M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD_MAX)


@contextlib.contextmanager
def _no_holes(libc: ctypes.CDLL) -> Iterator[None]:
    """Within the block nothing that is free in this thread's heap serves a block of OWN_MAPPING bytes or more.

    A thread inherits the heap of one that has ended, holes included, and malloc fills those before it maps anything: what the call frees
    there would stay resident. So they are filled here, the large ones first, without touching more than their headers.
    """
    fillers = []
    try:
        for bits in range(MOST_OF_A_HOLE.bit_length() - 1, OWN_MAPPING.bit_length() - 2, -1):
            while (block := libc.malloc(1 << bits)) and not _is_mapping(block):
                fillers.append(block)
            libc.free(block)
        yield
    finally:
        for block in fillers:
            libc.free(block)


MOST_OF_A_HOLE = 64 << 20  # what glibc gives a thread's heap in one piece


def _is_mapping(block: int) -> bool:
    """Whether glibc's malloc mapped this block by itself: a bit of the size that it keeps in front of it."""
    return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)


@contextlib.contextmanager
def few_collected() -> Iterator[None]:
    """Within the block Python's garbage collector leaves alone what is there: to look through all of torch takes it a tenth of a second."""
    if gc.get_freeze_count():  # the caller's own, whom unfreezing would surprise
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _status(key: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018  # musl has a libc.so.6 on some systems, but no such function
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        return libc
    except (OSError, AttributeError):
        return None
