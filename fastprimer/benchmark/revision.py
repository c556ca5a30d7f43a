"""Another revision of this repository, measured in turns with the working tree.

The revision is checked out into a temporary git worktree. Its native library is copied from here if no native source differs,
else built there, as `setup.py build_ext --inplace` does (minutes). Then child processes run the `fastprimer bench` of either tree by
turns, old, new, new, old, ..., so that a machine that becomes slower does so for both; each tree is judged by its own proof.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fastprimer.benchmark.rows import Results, ResultsError, git, in_own_checkout

HERE = Path(__file__).resolve().parents[2]
NATIVE = ("csrc", "CMakeLists.txt", "setup.py")


class RevisionError(RuntimeError):
    """A revision that cannot be checked out, built or measured."""


def resolve(revision: str) -> str:
    """Its commit, or "" if git or the revision is not there."""
    return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}") if in_own_checkout() else ""


def measure_by_turns(commit: str, options: list[str], turns: int, say: Callable[[str], None]) -> list[tuple[Results, Results]]:
    """(results of the commit, results of the working tree) of each turn."""
    with checked_out(commit, say) as tree:
        runs: dict[Path, list[Results]] = {tree: [], HERE: []}
        for turn in range(turns):
            for root in (tree, HERE) if turn % 2 == 0 else (HERE, tree):
                say(f"turn {turn + 1} of {turns}: measuring {commit[:9] if root == tree else 'the working tree'}")
                runs[root].append(_measured(root, options))
    return list(zip(runs[tree], runs[HERE], strict=True))


@contextlib.contextmanager
def checked_out(commit: str, say: Callable[[str], None]) -> Iterator[Path]:
    """A built worktree of the commit, removed in the end."""
    with tempfile.TemporaryDirectory(prefix="fastprimer-") as folder:
        tree = Path(folder) / "tree"
        _run(["git", "worktree", "add", "--detach", str(tree), commit], HERE)
        try:
            # An editable install of this tree would otherwise answer for the other one's Triton kernels.
            (tree / "fastprimer/kernels").symlink_to(tree / "kernels")
            unchanged = subprocess.run(["git", "diff", "--quiet", commit, "--", *NATIVE], cwd=HERE).returncode == 0
            built = [*(HERE / "fastprimer").glob("_*.so"), *(HERE / "fastprimer").glob("_native.json")]
            if unchanged and built:
                for file in built:
                    shutil.copy2(file, tree / "fastprimer")
            else:
                say(f"building the native library of {commit[:9]}: this takes minutes")
                _run([sys.executable, "setup.py", "build_ext", "--inplace"], tree)
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, capture_output=True)


def _measured(root: Path, options: list[str]) -> Results:
    command = [sys.executable, "-m", "fastprimer.cli", "bench", "--json", *options]
    child = subprocess.run(command, cwd=root, env=_environment(root), capture_output=True, text=True)
    if child.returncode not in (0, 1):  # 1: something is wrong, and the results say what
        raise RevisionError(f"`fastprimer bench` of {root}: {_last_line(child.stderr)}")
    try:
        return Results.parse(child.stdout, f"`fastprimer bench --json` of {root}")
    except ResultsError as error:
        raise RevisionError(str(error)) from None


def _environment(root: Path) -> dict[str, str]:
    """With this tree first in Python's path, and the build tools of this Python's environment in the shell's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"PYTHONPATH": str(root), "PATH": path}


def _run(command: list[str], where: Path) -> None:
    done = subprocess.run(command, cwd=where, env=_environment(where), capture_output=True, text=True)
    if done.returncode:
        raise RevisionError(f"{' '.join(command)}: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")
