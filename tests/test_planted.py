"""That every planted bug can be planted: `make test` plants every eighth, and the others must not be lost as the code moves on."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import test_cpu_kernels
import test_emulator

from emulator.build import ROOT

TRITON = "attention_bugs cross_entropy_bugs decoding moe rms_norm rope routing swiglu".split()


def misfits(bugs):
    """Those of {name: (file, text)} whose text does not occur exactly once."""
    return [(name, text) for name, (file, text) in bugs.items() if Path(file).read_text().count(text) != 1]


def test_the_bugs_of_the_cpu_kernels_fit():
    for bugs in test_cpu_kernels.PLANTED.values():
        assert not misfits({name: (ROOT / "csrc/cpu" / file, text) for name, (file, text, _) in bugs.items()})


def test_the_bugs_of_the_emulated_kernels_fit():
    bugs = enumerate(test_emulator.ALL_BUGS)
    assert not misfits({(i, bug.name): (ROOT / bug.patch.file, bug.patch.before) for i, bug in bugs})


@pytest.mark.parametrize("stem", TRITON)
def test_the_bugs_of_the_triton_kernels_fit(stem):
    pytest.importorskip("triton")
    tests = importlib.import_module(f"test_triton_{stem}")
    bugs = {name: bug if isinstance(bug[0], ModuleType) else (tests.kernels, *bug) for name, bug in tests.PLANTED.items()}
    assert not misfits({name: (module.__file__, text) for name, (module, text, *_) in bugs.items()})
