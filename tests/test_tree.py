"""The tree says what it holds: files = declared backends = README's table, and rooms stay small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastprimer.backends import declared, operations, schema
from fastprimer.backends import implementation as implementation_of
from fastprimer.doctor import markdown

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("fastprimer", "kernels", "csrc", "tests", "benchmarks")
SOURCES = [p for room in ROOMS for p in (ROOT / room).rglob("*") if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
KERNEL = {"triton": "kernels/{}.py", "cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu"}


def stem(op: str) -> str:
    return implementation_of(op, "reference").__dict__[f"{op}_forward"].__module__.rpartition(".")[2]


@pytest.mark.parametrize("backend", KERNEL)
def test_files_are_the_declared_backends(backend):
    pattern = KERNEL[backend]
    folder, suffix = (ROOT / pattern).parent, Path(pattern).suffix
    expected = {stem(op) for op in operations() if backend in declared(op)}
    helpers = {"dispatch", "memory", "brgemm"} | {f"{op}_hopper" for op in expected}
    assert {p.stem for p in folder.glob(f"*{suffix}") if not p.stem.startswith("_")} - helpers == expected


def test_readme_shows_the_table_of_the_code():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- backends -->\n(.*?)\n<!-- /backends -->", readme, re.S).group(1)
    assert shown == markdown(), "run `fastprimer doctor --markdown` and paste its table into README.md"


@pytest.mark.slow
def test_readme_example_runs():
    """As a user would run it, in a process of its own."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    run = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("rms_norm: ")


def test_no_room_is_too_large():
    large = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not large


def test_device_code_includes_no_torch_header():
    device = [p for p in SOURCES if p.suffix in {".cu", ".cuh"}]
    assert device and not [p for p in device if re.search(r"#include\s*[<\"](torch|ATen|c10)", p.read_text())]


def test_native_signatures_are_those_of_the_chapters():
    text = re.sub(r'"\s*\n\s*"', "", (ROOT / "csrc/schemas.cpp").read_text())  # a long string in several pieces
    native = dict(re.findall(r'm\.def\(\s*"(\w+)(\(.*?\) -> .*?)"\);', text))
    for op in operations():
        if {"cpu", "cuda"} & set(declared(op)):
            for name, function in vars(implementation_of(op, "reference")).items():
                assert native[name] == schema(function.__wrapped__), name


def test_importing_fastprimer_imports_neither_triton_nor_kernels():
    code = "import sys, torch; before = set(sys.modules); import fastprimer; new = set(sys.modules) - before; print(*new)"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert not [m for m in new if m.split(".")[0] == "triton" or m.startswith("fastprimer.kernels")]


def test_the_reference_model_is_independent_of_the_operations():
    text = (ROOT / "fastprimer/reference.py").read_text()
    imports = re.findall(r"^(?:from|import) (fastprimer\S*)", text, re.M)
    assert imports == ["fastprimer.config"]
