"""`make gpu` rehearsed without a GPU: a stand-in for python writes down what it is called with, and that is what really exists."""

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastprimer.verify import Part

ROOT = Path(__file__).resolve().parent.parent
PARTS = "probe test sanitize train models bench profile growth tune"
STAND_IN = r"""#!/bin/sh
case "$1" in
  -) cat > "$0.asked"; if grep -q get_device_capability "$0.asked"; then echo 90a; fi ;;
  -c) case "$2" in *get_device_name*) echo nvidia-h200 ;; esac ;;
  *) echo "CALL $*"; case "$*" in *"$FAILS"*) exit 3 ;; *"$HANGS"*) sleep 60 ;; esac ;;
esac
"""


@pytest.fixture
def rehearse(tmp_path):
    python, sanitizer = tmp_path / "python", tmp_path / "compute-sanitizer"
    python.write_text(STAND_IN)
    sanitizer.write_text('#!/bin/sh\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n')
    for file in (python, sanitizer):
        file.chmod(0o755)

    def run(parts=PARTS, fails="no call", hangs="no call", **settings):
        environment = {"PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin", "FAILS": fails, "HANGS": hangs, "WHAT": parts}
        environment |= {"PYTHON": str(python), "RESULTS": str(tmp_path / "results")} | settings
        done = subprocess.run(["make", "-s", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50)
        return done, [shlex.split(call) for call in re.findall(r"^CALL (.*)$", done.stdout, re.M)]

    return run


def options_of(module: str, options: list[str]) -> argparse.Namespace:
    """Of a command of fastprimer; fails where it has no such option."""
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    return parser.parse_args(options)


def parser_of(script: Path) -> argparse.ArgumentParser:
    specification = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.parser()


def check(call: list[str]) -> str:
    """What a call is for; fails where the program, a file or an option that it names does not exist."""
    match call:
        case ["-m", "fastprimer.cli", command, *options]:
            options_of(f"fastprimer.{command}", options)
            return command
        case ["-m", "fastprimer.verify", "cuda", "cuda", "0", part, op]:
            options_of("fastprimer.verify", ["--op", op])
            assert Part.parse(part).of >= 1
            return "sanitize"
        case ["-m", "pytest", *options]:
            files = [option.partition("::") for option in options if option.startswith("test_")]
            for name, _, test in files:
                assert f"def {test}" in (ROOT / "tests" / name).read_text()
            return "test" if len(files) > 5 else ""
        case ["-m", module]:
            assert importlib.util.find_spec(module)
            return module
        case ["-m", "pip", "install", *_]:
            return "build"
        case [script, *options]:
            parser_of(ROOT / script).parse_args(options)
            return Path(script).stem
    return ""


def test_every_part_is_a_call_that_exists(rehearse):
    done, calls = rehearse()
    assert done.returncode == 0, done.stdout + done.stderr
    found = [check(call) for call in calls]
    assert set(found) - {"build"} == {"doctor", "emulator.probe", "test", "sanitize", "train", "bench", "profile_model", "tune"}
    assert found.count("sanitize") == 18 and found.count("train") == 4 and found.count("bench") == 6


def test_a_part_is_chosen_and_what_fails_does_not_keep_the_next_from_running(rehearse):
    done, calls = rehearse("models profile", fails="mixtral", CASE="llama-1b")
    assert done.returncode != 0 and done.stdout.count("FAILED") == 1
    assert [check(call) for call in calls if check(call) != "build"] == ["doctor"] + 4 * ["bench"] + 2 * ["profile_model"]


def test_a_part_that_does_not_exist_is_refused(rehearse):
    done, calls = rehearse("probe tets")
    assert done.returncode != 0 and not calls and "make gpu: WHAT: expected some of probe test" in done.stderr and "got tets" in done.stderr


def test_no_script_hides_a_module_of_python():
    """A script's folder comes first where modules are looked for: a profile.py there broke cProfile, and so torch.compile."""
    assert not {path.stem for path in (ROOT / "benchmarks").glob("*.py")} & sys.stdlib_module_names


def test_no_command_takes_longer_than_its_limit(rehearse):
    done, calls = rehearse("probe growth", hangs="emulator.probe", LIMIT="1")
    assert done.returncode != 0 and [check(call) for call in calls][-2:] == ["emulator.probe", "bench"]
