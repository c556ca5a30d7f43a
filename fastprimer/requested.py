"""Which backend is asked for: by FASTPRIMER_BACKEND, or within a block by `use_backend`.

What is in force stands in one list of this module, for torch.compile guards on a module's globals (and on no thread's own state): a
compiled function recompiles when the backend changes. It therefore holds for the whole process, not for one thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("reference", "cpu", "triton", "cuda")
VARIABLE = "FASTPRIMER_BACKEND"


def _valid(name: str, source: str) -> str:
    if name not in BACKENDS + ("auto",):
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS + ('auto',))}, got {name!r}")
    return name


def _of_environment() -> str:
    try:
        return _valid(os.environ.get(VARIABLE) or "auto", VARIABLE)
    except ValueError as error:
        # The command line imports this package before any line of its own, and owes its user a sentence, not a traceback.
        script = sys.argv[0] if sys.argv else ""
        if Path(script).stem == "fastprimer" or (script == "-m" and {"fastprimer", "fastprimer.cli"} & set(sys.orig_argv)):
            print(f"fastprimer: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        raise


@dataclass(eq=False)
class Request(contextlib.ContextDecorator, contextlib.AbstractContextManager):
    """A block of `use_backend`. Where threads leave theirs in another order than they entered them, those still open stay in force."""

    name: str
    missing: str

    def __enter__(self) -> None:
        _requests.append(self)

    def __exit__(self, *_) -> None:
        del _requests[len(_requests) - 1 - _requests[::-1].index(self)]  # a block may be within itself


_requests = [Request(_of_environment(), "raise")]
"""The last one is in force."""


def use_backend(name: str, *, missing: str = "raise") -> contextlib.AbstractContextManager:
    """Within the block, every operation runs on the backend `name`, or raises BackendError with the reason it cannot.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" (the default: the fastest that can serve the call).
        missing: what an operation does that has no such kernel at all: "raise", or "auto" to choose automatically.

    The choice holds for the whole process (see the head of this file); blocks nest.

    Raises:
        ValueError: another name, or another `missing`.
    """
    _valid(name, "use_backend: name")
    if missing not in ("raise", "auto"):
        raise ValueError(f"use_backend: missing: expected 'raise' or 'auto', got {missing!r}")
    return Request(name, missing)


def requested() -> Request:
    """What is in force."""
    return _requests[-1]
