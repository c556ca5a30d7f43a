"""The training loop: next-token prediction with AdamW, and a state that is saved whole and resumed bit for bit.

A task offers a name, a config, a vocabulary, its tokens, samples() to show, batch(step, size) -> tokens, labels, evaluate(model) and
describe(what that measured) (see fastprimer/calculator.py). A batch is a function of the seed and the step alone, and the model draws
nothing at random, so that the weights, their average, the optimizer's state and the number of the step are all there is to save.

The schedule is warm-up, stable, decay: the learning rate rises over the first steps, stays, and falls to zero over the last 40%.
What is evaluated and kept is the exponential average of the weights, of the first steps a shorter one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastprimer import reference
from fastprimer.backends import BACKENDS, VARIABLE, BackendError, use_backend
from fastprimer.calculator import Calculator, MixtureCalculator
from fastprimer.checkpoint import WEIGHTS_FILE, CheckpointError, Tensors, load_checkpoint, save_checkpoint
from fastprimer.config import ConfigError
from fastprimer.feed_forward import auxiliary_losses, utilisation
from fastprimer.generate import LogitsError, answer
from fastprimer.memory import few_collected, keep_freed_memory
from fastprimer.model import Model
from fastprimer.options import amount, natural, positive, thread_count
from fastprimer.train_report import Report, is_simulated, prepare_backend, serving, write_loss_curve

TASKS = {task.name: task for task in (Calculator, MixtureCalculator)}
MODELS = {"fast": Model, "reference": reference.Model}
CHECKPOINT_FILE = "checkpoint.safetensors"
CHOICES = ("auto", *BACKENDS)
SAVE_EVERY = 500
PROGRESS_EVERY = 100
THREADS = 1
"""By default: 100 thousand weights gain a tenth from a second thread, and lose a factor where another program has the core."""


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclass(frozen=True)
class Settings:
    """What a run computes, and so what a resumed run must share with the one that it continues."""

    seed: int = 0
    steps: int = 2500
    batch_size: int = 128
    learning_rate: float = 3e-3
    warm_up: int = 50
    decay: float = 0.4  # the share of the steps over which the learning rate falls
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    average: float = 0.99
    balance: float = 0.01  # of the routers' losses, where there are experts: Switch, section 2.2, and ST-MoE, equation 5
    z: float = 0.001

    def __post_init__(self):
        shares = "decay", "beta1", "beta2", "average"
        for name, value in dataclasses.asdict(self).items():
            least, most = (1 if name in ("steps", "batch_size", "warm_up") else 0), (1 if name in shares else math.inf)
            if not least <= value <= most or value == math.inf or (name == "seed" and value >= 2**31):
                raise ValueError(f"{name}: expected a number from {least} to {most}, got {value}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rise = (step + 1) / self.warm_up
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, rise, fall)

    def kept(self, step: int) -> float:
        """The share that a step leaves of the average so far: less at first, or a short run's would be of its first weights by half."""
        return min(self.average, (1 + step) / (10 + step))


class Trainer:
    """A model, its optimizer and the average of its weights, somewhere between the first step and the last."""

    def __init__(self, task, model: nn.Module, settings: Settings):
        self.task, self.model, self.settings = task, model, settings
        torch.manual_seed(settings.seed)
        reference.initialize(model, task.config.initializer_range)
        self.parameters = dict(model.named_parameters())
        groups = [
            {"params": [p for p in self.parameters.values() if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)
        self.average = AveragedModel(model, multi_avg_fn=self._add_to_average)
        self.device = next(iter(self.parameters.values())).device
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.losses: list[float] = []

    def train_step(self) -> None:
        begin = time.perf_counter()
        tokens, labels = (t.to(self.device) for t in self.task.batch(self.step, self.settings.batch_size))
        loss = self.model(tokens, labels)
        self.optimizer.zero_grad()
        sum(self._auxiliary(), loss).backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.losses.append(loss.item())
        self.step += 1
        self.tokens += _count_inputs(labels)
        self.seconds += time.perf_counter() - begin
        if not math.isfinite(self.losses[-1]):
            raise TrainingError(f"the loss of step {self.step} is {self.losses[-1]}: try a smaller --learning-rate")

    def _add_to_average(self, average: list[Tensor], weights: list[Tensor], _) -> None:
        get_ema_multi_avg_fn(self.settings.kept(self.step))(average, weights, _)

    def _auxiliary(self) -> list[Tensor]:
        """The routers' losses of the step, times their coefficients, none of a dense model; `losses` are without them."""
        losses_of = reference.auxiliary_losses if isinstance(self.model, reference.Model) else auxiliary_losses
        return [getattr(self.settings, name) * value for name, value in losses_of(self.model).items()]

    def utilisation(self) -> dict[str, dict]:
        """How the experts were used in the last step, by layer: see layers.utilisation; empty for a dense or a plain model."""
        return utilisation(self.model)

    @property
    def recent_loss(self) -> float:
        recent = self.losses[-PROGRESS_EVERY:]
        return sum(recent) / max(1, len(recent))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def state(self) -> Tensors:
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": t for key, t in self.optimizer.state[parameter].items()}
        return tensors | {"losses": torch.tensor(self.losses, dtype=torch.float64)}

    def save(self, path: Path) -> None:
        for name, parameter in self.parameters.items():  # the last loss says nothing about the step after it
            if not parameter.isfinite().all():
                raise TrainingError(f"{name} is not finite after step {self.step}: try a smaller --learning-rate")
        save_checkpoint(path, self.state(), describe(self.task, self.settings) | self._counters())

    def _counters(self) -> dict:
        return {"step": self.step, "seconds": self.seconds, "tokens": self.tokens}

    def load(self, tensors: Tensors, record: dict) -> None:
        """Take up the state of a checkpoint that was made for this task and these settings."""
        try:
            self.step, self.seconds, self.tokens = int(record["step"]), float(record["seconds"]), int(record["tokens"])
            self.losses = tensors["losses"].tolist()
            if tensors["losses"].dim() != 1 or len(self.losses) != self.step:
                raise CheckpointError(f"the checkpoint is of step {self.step}, but has {len(self.losses)} losses")
            self.model.load_state_dict(_below("model.", tensors))
            self.average.load_state_dict(_below("average.", tensors))
            for name, parameter in self.parameters.items() if self.step else ():
                state = {key: tensors[f"optimizer.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                kinds = [(t.shape, t.dtype) for t in state.values()]
                if kinds != [(torch.Size(), torch.float32), *[(parameter.shape, parameter.dtype)] * 2]:
                    raise CheckpointError(f"the checkpoint does not fit the model: the optimizer's state of {name}")
                self.optimizer.state[parameter] = {key: t.to(self.device) for key, t in state.items()}
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the checkpoint does not fit the model: {str(error).splitlines()[0]}") from error


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _count_inputs(labels: Tensor) -> int:
    """How many tokens the model read, padding left out: all before the last label of each row."""
    counts = (labels != -100).flip(1).cumsum(1) > 0
    return int(counts[:, :-1].sum())


def describe(task, settings: Settings) -> dict:
    return {"task": task.name, "config": task.config.to_dict(), "settings": dataclasses.asdict(settings)}


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C and SIGTERM ask for a stop after the step in hand; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: False
        return
    received: list[int] = []

    def receive(number, _):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that is not Python's cannot be put back
                signal.signal(number, handler)


def train(trainer: Trainer, path: Path, report: Report, stop_at: int | None = None) -> bool:
    """Train to the last step, or to stop_at, or until a stop is requested, and save; returns whether the last step was done."""
    steps = trainer.settings.steps
    last = min(steps, steps if stop_at is None else stop_at)
    with stop_requested() as stopping, report.progress(steps, trainer.step) as advance, few_collected():
        while trainer.step < last and not stopping():
            trainer.train_step()
            try:
                advance(trainer)
            except OSError:  # nobody can be told any more, but what was learned is not lost
                trainer.save(path)
                raise
            if trainer.step % SAVE_EVERY == 0 and trainer.step < last:
                trainer.save(path)
        trainer.save(path)
    return trainer.step == steps


def settings_for(args: argparse.Namespace, record: dict | None) -> Settings:
    """The defaults, or the settings of the checkpoint to resume, with what was given on the command line."""
    given = {name: getattr(args, name) for name in ("seed", "steps", "batch_size", "learning_rate")}
    given = {name: value for name, value in given.items() if value is not None}
    if record is None:
        return Settings(**given)
    try:
        settings = Settings(**{field.name: type(field.default)(record["settings"][field.name]) for field in dataclasses.fields(Settings)})
        task, config = record["task"], record["config"]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not say how it was made: {error}") from error
    if task != args.task:
        raise CheckpointError(f"the checkpoint is of the task {task!r}, not {args.task!r}")
    if config != TASKS[args.task].config.to_dict():
        raise CheckpointError("the checkpoint was made for a model of another configuration")
    for name, value in given.items():
        made = getattr(settings, name)
        if value != made:
            raise CheckpointError(f"the checkpoint was made with --{name.replace('_', '-')} {made}, not {value}; leave the option out")
    return settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    parser.add_argument(
        "task",
        choices=sorted(TASKS),
        help="calculator: arithmetic in words, 'two plus three equals' -> 'five'; calculator-moe: with experts",
    )
    parser.add_argument("--out", metavar="DIR", help="where to write the model, checkpoint and loss curve (default: runs/TASK)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out; the same bits as a run in one go")
    parser.add_argument("--seed", type=natural, metavar="N", help=f"of the weights, the split and the batches (default: {defaults.seed})")
    parser.add_argument("--steps", type=positive, metavar="N", help=f"(default: {defaults.steps})")
    parser.add_argument("--batch-size", type=positive, metavar="N", help=f"(default: {defaults.batch_size})")
    parser.add_argument("--learning-rate", type=amount, metavar="X", help=f"the highest (default: {defaults.learning_rate})")
    parser.add_argument("--stop-at", type=positive, metavar="N", help="stop after step N as Ctrl-C does: with a checkpoint to resume from")
    parser.add_argument(
        "--backend",
        choices=CHOICES,
        default=os.environ.get(VARIABLE) or "auto",
        help=f"which one computes every operation that has such a kernel (default: {VARIABLE}, else auto)",
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="fast", help="fast: on fastprimer's layers; reference: plain torch")
    parser.add_argument("--threads", type=thread_count, metavar="N", help=f"CPU threads (default: {THREADS})")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line, the last one with the result; its `times` were trained on"
    )


def run(args: argparse.Namespace) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or THREADS)
    keep_freed_memory()
    out = Path(args.out or f"runs/{args.task}")
    earlier = _saved(out / CHECKPOINT_FILE)
    try:
        return _run(args, out)
    except BrokenPipeError:  # not of a file: whoever read what is printed went away
        raise
    except (ConfigError, CheckpointError, BackendError, TrainingError, LogitsError, OSError) as error:
        print(f"fastprimer train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = _kept(out / CHECKPOINT_FILE, None if args.resume else earlier)
        print(f"fastprimer train: stopped at once; {kept}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)


def _saved(path: Path) -> float | None:
    """When a checkpoint was written; None: there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _kept(path: Path, foreign: float | None) -> str:
    """What a run leaves that was stopped at once; foreign: when another run wrote the checkpoint that was there before."""
    saved = _saved(path)
    if saved is None:
        return "there is no checkpoint yet"
    return f"it has no checkpoint yet, {path} is an earlier run's" if saved == foreign else "the last checkpoint is whole"


def _run(args: argparse.Namespace, out: Path) -> int:
    path = out / CHECKPOINT_FILE
    tensors, record = load_checkpoint(path) if args.resume else ({}, None)
    settings = settings_for(args, record)
    device = prepare_backend(args.backend)
    task = TASKS[args.task](settings.seed)
    if settings.batch_size > len(task.tokens):
        raise TrainingError(f"argument --batch-size: expected at most all {len(task.tokens)} examples, got {settings.batch_size}")
    quick = "auto" if is_simulated(args.backend, device) else args.backend  # evaluation would take hours there
    with use_backend(args.backend, missing="auto"):
        served_by = serving(task.config, device) if args.model == "fast" else {}
        trainer = Trainer(task, MODELS[args.model](task.config).to(device), settings)
        if record is not None:
            trainer.load(tensors, record)
        out.mkdir(parents=True, exist_ok=True)
        report = Report(args, PROGRESS_EVERY)
        report.start(trainer, served_by, path)
        if not trainer.step:
            with use_backend(quick, missing="auto"):
                report.samples("before", _samples(task, trainer.model))
        if not train(trainer, path, report, args.stop_at):
            report.stopped(trainer, path, resume_command(args, out), out / WEIGHTS_FILE if (out / WEIGHTS_FILE).exists() else None)
            return 0 if args.stop_at and trainer.step >= args.stop_at else 130
    model = trainer.average.module
    with use_backend(quick, missing="auto"):
        report.samples("after", _samples(task, model))
        measured = task.evaluate(model)
    _write_model(out, task, model)
    report.result(trainer, measured, [*write_loss_curve(out, trainer.losses), out / WEIGHTS_FILE, path], out)
    return 0


def _samples(task, model: nn.Module) -> list[tuple[str, bool, str, float]]:
    return [(prompt, trained, *answer(model, task.vocabulary, prompt)) for prompt, trained in task.samples()]


def _write_model(out: Path, task, model: nn.Module) -> None:
    fast = Model(task.config)
    fast.load_state_dict(model.state_dict())
    fast.save_pretrained(out)
    task.vocabulary.save(out)


def resume_command(args: argparse.Namespace, out: Path) -> str:
    options = {"--backend": args.backend, "--model": args.model, "--threads": args.threads}
    defaults = {"--backend": "auto", "--model": "fast", "--threads": None}
    extra = [f"{name} {value}" for name, value in options.items() if value != defaults[name]]
    return " ".join(["fastprimer train", args.task, "--out", shlex.quote(str(out)), "--resume", *extra])
