"""benchmarks/tune.py in the interpreter: it finds every choice of a tile, tries the neighbours, and leaves the choosers as they were."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.cases import attention_case, loss_case, rms_norm_case  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs in the process that test_interpreter.py starts")

PATH = Path(__file__).resolve().parent.parent / "benchmarks/tune.py"
CASES = {
    "rms_norm": (rms_norm_case("tiny", 8, 64), {"FORWARD", "BACKWARD"}),
    "attention": (attention_case("tiny", (1, 20, 2, 16), (1, 20, 1, 16), causal=True), {"FORWARD", "DK_DV", "DQ"}),
    "cross_entropy": (loss_case("cross_entropy", "tiny", 4, 33), {"fold_tile", "gradient_tile"}),
}


@pytest.fixture
def tune():
    specification = importlib.util.spec_from_file_location("tune", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("op", CASES)
def test_neighbours_are_tried_at_every_choice(tune, op, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "neighbours", lambda tile, real=tune.neighbours: real(tile)[:2])
    case, choices = CASES[op]
    before = {name: getattr(tune.Choosers(op).module, name) for name in tune.CHOOSERS[op][1]}
    tune.main(["--op", op, "--dtype", "float32", "--rounds", "1", "--out", str(tmp_path / "tiles.md")], [case])
    rows = re.findall(rf"^\| {case} \| float32 \| (\w+) \| .*\| (now)? ?\|$", (tmp_path / "tiles.md").read_text(), re.M)
    assert {choice for choice, _ in rows} == choices and sum(mark == "now" for _, mark in rows) == len(choices)
    assert len(rows) >= 2 * len(choices)
    assert all(getattr(tune.Choosers(op).module, name) is function for name, function in before.items())


def test_a_tile_that_computes_something_else_is_left_out(tune, monkeypatch):
    real = tune._with_tile

    def spoiled(choosers, site, candidate, call):
        tried = real(choosers, site, candidate, call)
        return lambda: tuple(1.01 * result for result in tried())

    monkeypatch.setattr(tune, "_with_tile", spoiled)
    lines = list(tune.tune("rms_norm", CASES["rms_norm"][0], tune.torch.float32, "cpu", 1))
    assert sum("computes something else" in line for line in lines) == len(lines) - 2 > 2


def test_neighbours_differ_in_one_number(tune):
    kernels = importlib.import_module("fastprimer.kernels.attention")
    tile = kernels.FORWARD["sm_90"][128]
    found = tune.neighbours(tile)
    assert tile not in found and len(set(found)) == len(found) == 8
    assert all(sum(a != b for a, b in zip(tile, other, strict=True)) == 1 for other in found)
