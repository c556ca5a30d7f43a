"""The command line where nobody reads, where stdout is closed, and where options exclude each other."""

import io
import sys

import pytest

from fastprimer import cli, train
from fastprimer.checkpoint import load_checkpoint, save_checkpoint


class Reader(io.StringIO):
    """A stdout whose reader goes away after the words `until`."""

    def __init__(self, until):
        super().__init__()
        self.until = until

    def write(self, text):
        if self.until in self.getvalue():
            raise BrokenPipeError
        return super().write(text)


@pytest.fixture
def unheard(monkeypatch):
    def command(*line, until=""):
        monkeypatch.setattr(sys, "stdout", Reader(until))
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        said, close = [], sys.stderr.close
        monkeypatch.setattr(sys.stderr, "close", lambda: (said.append(sys.stderr.getvalue()), close()))
        status = cli.main([str(word) for word in line])
        assert said == [""]  # silence
        return status

    return command


@pytest.mark.parametrize("line", ["doctor", "doctor --json", "doctor --markdown", "scaling --flops 1e21", "scaling --flops 1e21 --json"])
def test_a_command_that_nobody_hears_ends_silently(line, unheard):
    assert unheard(*line.split()) == cli.UNHEARD


def test_what_was_learned_is_saved_when_nobody_hears_of_it(unheard, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(train, "PROGRESS_EVERY", 1)
    line = "train", "calculator", "--steps", 9, "--batch-size", 4, "--threads", 1, "--json", "--out", tmp_path / "x"
    assert unheard(*line, until='"step": 3') == cli.UNHEARD
    assert 3 <= load_checkpoint(tmp_path / "x/checkpoint.safetensors")[1]["step"] <= 5


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["doctor"]) == 0


def test_words_that_the_terminal_does_not_know_are_written_as_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["doctor"]) == 0
    assert written.getvalue().isascii() and b"cpu" in written.getvalue()


def test_doctor_prints_one_form(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["doctor", "--json", "--markdown"])
    assert error.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_no_json_is_printed_of_numbers_that_it_does_not_have(capsys):
    for options in ("--flops 1e308", "--flops 1e21 --tflops 1e-320"):
        assert cli.main(["scaling", *options.split(), "--json"]) == 2
        said = capsys.readouterr()
        assert not said.out and "beyond the range" in said.err


def test_a_batch_larger_than_the_data_is_refused(tmp_path, capsys):
    assert cli.main(["train", "calculator", "--batch-size", "13406", "--out", str(tmp_path / "x")]) == 2
    assert "argument --batch-size: expected at most all 13405 examples, got 13406" in capsys.readouterr().err


BROKEN = {"warm_up": 0, "batch_size": 0, "average": 5, "beta1": 2, "beta2": -1, "seed": 2**70, "steps": 0, "clip": -1.0, "decay": 1e400}


def test_a_checkpoint_with_settings_out_of_range_is_refused(tmp_path, capsys, one_thread):
    path, line = tmp_path / "checkpoint.safetensors", ["train", "calculator", "--threads", "1", "--out", str(tmp_path)]
    assert cli.main([*line, "--steps", "4", "--stop-at", "2", "--batch-size", "4"]) == 0
    state, record = load_checkpoint(path)
    moment = "optimizer.model.norm.weight.exp_avg"
    wrong = [(state, record | {"settings": record["settings"] | {name: value}}) for name, value in BROKEN.items()]
    wrong += [(state, record | {"step": 1e400}), (state | {moment: state[moment].bfloat16()}, record)]
    wrong += [(state | {"losses": state["losses"].view(2, 1)}, record)]
    for broken in wrong:
        save_checkpoint(path, *broken)
        capsys.readouterr()
        assert cli.main([*line, "--resume"]) == 2, broken[1]
        said = capsys.readouterr().err
        assert said.startswith("fastprimer train: error: ") and said.count("\n") == 1
