"""Compiles and runs the checks of emulated CUDA kernels: plain, or under a sanitizer; as they are, or with a bug planted."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path("tests/emulator")
FOLDERS = HERE, Path("csrc"), Path("csrc/cuda")
CHECKS = {
    "reports": [HERE / "check_reports.cpp"],
    "reports_hopper": [HERE / "check_reports_hopper.cpp"],
    "gemm": [HERE / "check_gemm.cpp"],
    **{
        op: [HERE / f"check_{op}.cpp", Path(f"csrc/cuda/{op}.cu")]
        for op in ("rms_norm", "rope", "swiglu", "attention", "decoding", "routing", "moe", "cross_entropy")
    },
    "attention_hopper": [HERE / "check_attention_hopper.cpp", *map(Path, ("csrc/cuda/attention.cu", "csrc/cuda/attention_hopper.cu"))],
}
"""Programs for the emulator itself, one for each operation, and one for each that has kernels of its own for Hopper."""

KINDS = {
    "plain": ["-O1"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fno-builtin", "-g1", "-fsanitize=thread"],
}
"""Of the thread sanitizer optimised programs take longer to compile and a third of the time to run. It sees a memcpy that is a call, and
not always one that the compiler has made an access of its own.
"""
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


def text_of(source: Path, tree: Path) -> str:
    """A source and all of the tree's files that it includes, each with its name."""
    texts: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        file = waiting.pop()
        if file not in texts:
            texts[file] = (tree / file).read_text()
            names = re.findall(r'#include "(.*?)"', texts[file])
            found = {Path(os.path.normpath(folder / name)) for name in names for folder in (file.parent, *FOLDERS)}
            waiting += [file for file in found if (tree / file).exists()]
    return "".join(f"{file}\n{texts[file]}" for file in sorted(texts))


def standard_headers(flags: list[str], objects: Path) -> list[str]:
    """Options by which a source finds the emulator's headers of the standard library, a third of the time, compiled already."""
    names = {name for file in (ROOT / HERE).glob("*.h") for name in re.findall(r"#include <(\w+)>", file.read_text())}
    text = "".join(f"#include <{name}>\n" for name in sorted(names))
    folder = objects / hashlib.sha256("\0".join([compiler(), *flags, text]).encode()).hexdigest()[:32]
    if not folder.exists():
        new = Path(tempfile.mkdtemp(dir=objects))
        (new / "standard.h").write_text(text)
        subprocess.run([compiler(), *flags, "-x", "c++-header", new / "standard.h", "-o", new / "standard.h.gch"], check=True)
        with contextlib.suppress(OSError):  # another process was quicker
            new.rename(folder)
    return ["-include", str(folder / "standard.h")]


def compile_program(program: Path, sources: list[Path], kind: str, tree: Path = ROOT, objects: Path | None = None) -> Path:
    """Builds `sources` of a tree. A tree with a bug is built without optimisation, but for the thread sanitizer: it runs once, and not for
    long.

    With a folder `objects`, what was compiled there before, by the same command from the same text, is not compiled again: most
    of a program with a bug is that of the next. Other processes may use the folder at the same time.
    """
    flags = [*FLAGS, *KINDS[kind], *([] if tree == ROOT or kind == "thread" else ["-O0"])]
    if any(source.stem.endswith("_hopper") for source in sources):
        flags.append("-DFASTPRIMER_HOPPER")
    if objects and tree != ROOT:  # the project's own sources must include what they need
        flags += standard_headers(flags, objects)
    command = [compiler(), *flags, *(f"-I{folder}" for folder in FOLDERS), "-x", "c++", "-c"]
    built, running = [], []
    for source in sources:
        key = hashlib.sha256("\0".join([*command, text_of(source, tree)]).encode()).hexdigest()
        built.append((objects or program.parent) / f"{source.stem}_{key[:32]}.o")
        if not built[-1].exists():
            part = program.with_name(f"{program.name}_{source.stem}.o")
            running.append((part, built[-1], subprocess.Popen([*command, source, "-o", part], cwd=tree)))
    if any([process.wait() for _, _, process in running]):
        raise RuntimeError(f"{program.name} does not compile")
    for part, whole, _ in running:
        part.replace(whole)
    subprocess.run([compiler(), *KINDS[kind], "-pthread", *built, "-o", program], check=True)
    return program


def patched_tree(patch: Patch, folder: Path) -> Path:
    """A copy of the sources, in `folder`, with a bug."""
    tree = folder / "tree"
    for source in ("csrc", HERE):
        shutil.copytree(ROOT / source, tree / source)
    patch.apply(tree)
    return tree


def compile_check(name: str, kind: str, folder: Path, patch: Patch | None = None, objects: Path | None = None) -> Path:
    """The program that runs check `name`, built in `folder` from the project's sources or from a patched copy of them."""
    tree = ROOT if patch is None else patched_tree(patch, folder)
    return compile_program(folder / f"{name}_{kind}", CHECKS[name], kind, tree, objects)


def run_check(program: Path, seeds: int, *, quick: bool = True, until: str | None = None) -> subprocess.CompletedProcess:
    """Runs a check with seeds 0 .. seeds - 1, no further than a failure with the words `until`; return code 0: all pass."""
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
    if until:
        options["FASTPRIMER_UNTIL"] = until
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
