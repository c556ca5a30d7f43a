"""Types of command-line arguments, which argparse calls and quotes."""

from __future__ import annotations

import argparse
import math
import os


def positive(text: str) -> int:
    """An argument: an integer >= 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An argument: an integer >= 0."""
    return _integer(text, 0)


def thread_count(text: str) -> int:
    """An argument: a number of CPU threads; with a hundred thousand OpenMP would end the process."""
    return _integer(text, 1, 16 * (os.cpu_count() or 1))


def _integer(text: str, least: int, most: int = 2**31 - 1) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {text}")
    return int(text)


def amount(text: str) -> float:
    """An argument: a finite number > 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def temperature(text: str) -> float:
    """An argument: a finite number >= 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return value
