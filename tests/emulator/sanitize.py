"""The long form of the emulator's checks, every kernel in every kind of build: PYTHONPATH=tests python -m emulator.sanitize --seeds 20"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .build import CHECKS, KINDS, compile_check, reason_not, run_check


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every emulated CUDA kernel plain, under ASan and UBSan, and under TSan.")
    parser.add_argument("--seeds", type=int, default=20, help="schedules per case (default 20)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of build (default: all)")
    arguments = parser.parse_args()
    failed = False
    for kind in arguments.kinds:
        for name in CHECKS:
            if reason_not(kind):
                print(f"{kind:8} {name:10} skipped: {reason_not(kind)}")
                continue
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                seeds = max(1, arguments.seeds // 10) if kind == "thread" else arguments.seeds
                result = run_check(compile_check(name, kind, Path(folder)), seeds, quick=kind == "thread")
            verdict = "FAILED" if result.returncode else "passed"
            print(f"{kind:8} {name:10} {verdict}, {seeds} seeds, {time.perf_counter() - begin:.0f} s", flush=True)
            if result.returncode:
                failed = True
                print(result.stdout)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
