"""Compiles and runs the checks of emulated CUDA kernels: plain, or under a sanitizer; as they are, or with a bug planted."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path("tests/emulator")
CHECKS = {
    "reports": [HERE / "check_reports.cpp"],
    "reports_hopper": [HERE / "check_reports_hopper.cpp"],
    "gemm": [HERE / "check_gemm.cpp"],
    **{
        op: [HERE / f"check_{op}.cpp", Path(f"csrc/cuda/{op}.cu")]
        for op in ("rms_norm", "rope", "swiglu", "attention", "decoding", "routing", "moe")
    },
    "attention_hopper": [HERE / "check_attention_hopper.cpp", *map(Path, ("csrc/cuda/attention.cu", "csrc/cuda/attention_hopper.cu"))],
}
"""Programs for the emulator itself, one for each operation, and one for each that has kernels of its own for Hopper."""

KINDS = {
    "plain": ["-O1"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O0", "-g1", "-fsanitize=thread"],
}
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DFASTPRIMER_EMULATED", "-pthread"]


@dataclass(frozen=True)
class Patch:
    """A bug: in `file`, `before` becomes `after`. The text must occur exactly once."""

    file: str
    before: str
    after: str

    def apply(self, tree: Path) -> None:
        text = (tree / self.file).read_text()
        if text.count(self.before) != 1:
            raise ValueError(f"{self.file} has {text.count(self.before)} times, not once: {self.before!r}")
        (tree / self.file).write_text(text.replace(self.before, self.after))


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def compile_program(program: Path, sources: list[Path], kind: str, tree: Path = ROOT) -> Path:
    """Builds `sources` of a tree. A tree with a bug is built without optimisation: it runs once, and not for long."""
    folders = [f"-I{tree / folder}" for folder in (HERE, "csrc", "csrc/cuda")]
    objects = [program.with_name(f"{program.name}_{source.stem}.o") for source in sources]
    flags = [*FLAGS, *KINDS[kind], *([] if tree == ROOT else ["-O0"])]
    if any(source.stem.endswith("_hopper") for source in sources):
        flags.append("-DFASTPRIMER_HOPPER")
    compile_one = [compiler(), *flags, *folders, "-x", "c++", "-c"]
    running = [subprocess.Popen([*compile_one, tree / source, "-o", to]) for source, to in zip(sources, objects, strict=True)]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"{program.name} does not compile")
    subprocess.run([compiler(), *KINDS[kind], "-pthread", *objects, "-o", program], check=True)
    return program


def patched_tree(patch: Patch, folder: Path) -> Path:
    """A copy of the sources, in `folder`, with a bug."""
    tree = folder / "tree"
    for source in ("csrc", HERE):
        shutil.copytree(ROOT / source, tree / source)
    patch.apply(tree)
    return tree


def compile_check(name: str, kind: str, folder: Path, patch: Patch | None = None) -> Path:
    """The program that runs check `name`, built in `folder` from the project's sources or from a patched copy of them."""
    tree = ROOT if patch is None else patched_tree(patch, folder)
    return compile_program(folder / f"{name}_{kind}", CHECKS[name], kind, tree)


def run_check(program: Path, seeds: int, *, quick: bool = True) -> subprocess.CompletedProcess:
    """Runs a check with seeds 0 .. seeds - 1; return code 0 if all pass, output in stdout."""
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [program, str(seeds), *(["quick"] if quick else [])]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | options)


@functools.cache
def reason_not(kind: str) -> str:
    """Why checks of this kind cannot be built and run on this machine, or ""."""
    if compiler() is None:
        return "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "empty.cpp", Path(folder) / "empty"
        source.write_text("int main() {}\n")
        built = subprocess.run([compiler(), *KINDS[kind], source, "-o", program], capture_output=True)
        if built.returncode != 0:
            return f"{compiler()} does not link with {KINDS[kind][-1]}"
        if subprocess.run([program], capture_output=True).returncode != 0:
            return f"programs built with {KINDS[kind][-1]} do not start here"
    return ""
