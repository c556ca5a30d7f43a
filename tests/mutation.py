"""Planted bugs: a module with one line changed, to prove that a check sees the difference."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of the module in which `old`, which must occur exactly once, reads `new`."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__file__}"
    path = folder / f"mutated_{Path(module.__file__).name}"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
