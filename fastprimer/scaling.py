"""`fastprimer scaling`: how large a model, and how many tokens, for a budget: by published laws, or by one measured here.

With --flops, --parameters or --tokens: what the laws of fastprimer/scaling_law.py say, at once. Without: decoders of several sizes are
trained on bytes of a text, each for several numbers of tokens with a whole schedule of its own (what Hoffmann et al. 2022, section 3,
found decisive: a loss on the way of a longer run is too high), their losses on held-out text are fitted, and the fitted law stands beside
the published ones. Every finished run is kept in DIR/runs.json; --resume trains only what is missing there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fastprimer.backends import BackendError
from fastprimer.checkpoint import write_atomically
from fastprimer.config import Config, is_count, is_number
from fastprimer.memory import few_collected, keep_freed_memory
from fastprimer.model import Model
from fastprimer.options import amount, natural, positive, thread_count
from fastprimer.scaling_law import PUBLISHED, FitError, Law, Powers
from fastprimer.scaling_report import recommendations, recommended, show
from fastprimer.terminal import Console
from fastprimer.train import Settings, Trainer, TrainingError
from fastprimer.train_report import prepare_backend

LENGTH, BATCH = 64, 8
"""Tokens of a sequence that are predicted, and sequences of a step."""
HELD_OUT, BLOCK = 20, 32
"""Of every 20 neighbouring blocks of 32 sequences one is held out."""
EVALUATED = 4096
"""Sequences at most."""
RUNS_FILE = "runs.json"
RECIPE = 2
"""Of a run, raised whenever the same plan would end with another loss: runs of two recipes make no law. 2: the average of the weights is
shorter at first."""
OF_A_SWEEP = ("text", "widths", "ratios", "seed", "out", "resume", "threads", "draws")
"""Options without a meaning for a budget."""


class ScalingError(ValueError):
    """A text, or an earlier file of runs, that cannot be used."""


class Text:
    """Next-byte prediction: sequences of a text in random order, each once before any comes again. A task of fastprimer/train.py."""

    name = "text"

    def __init__(self, data: bytes, config: Config, seed: int):
        self.config, self.seed = config, seed
        self._epoch = None
        n = (len(data) - 1) // LENGTH
        if n < BLOCK * HELD_OUT:
            raise ScalingError(f"argument --text: expected at least {LENGTH * BLOCK * HELD_OUT + 1} bytes, got {len(data)}")
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        held_out = torch.arange(n) // BLOCK % HELD_OUT == HELD_OUT - 1
        self.sequences = whole.unfold(0, LENGTH + 1, LENGTH)  # a view: the last token of one is the first of the next
        self.trained, self.held_out = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]

    @property
    def trained_tokens(self) -> int:
        return len(self.trained) * LENGTH

    def _order(self, epoch: int) -> Tensor:
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.seed + 10**6 * epoch)
            self._epoch, self._shuffled = epoch, self.trained[torch.randperm(len(self.trained), generator=generator)]
        return self._shuffled

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        n = len(self.trained)
        rows = [self._order(i // n)[i % n] for i in range(step * size, (step + 1) * size)]
        tokens = self.sequences[torch.stack(rows)].long()
        return tokens, tokens

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean loss on held-out text, nats a byte."""
        chosen = self.held_out[torch.linspace(0, len(self.held_out) - 1, min(EVALUATED, len(self.held_out))).long()]
        device = next(model.parameters()).device
        losses = [
            model(tokens, tokens).item() * len(part) for part in chosen.split(256) for tokens in [self.sequences[part].long().to(device)]
        ]
        return sum(losses) / len(chosen)


def shape(width: int) -> Config:
    """A LLaMA of this width (a multiple of 16): a layer for every 24 features, heads of 16, two to a key/value
    head where their number is even."""
    heads = width // 16
    return Config(
        vocab_size=256, hidden_size=width, intermediate_size=max(16, round(width * 8 / 3 / 16) * 16), num_hidden_layers=max(1, width // 24),
        num_attention_heads=heads, num_key_value_heads=heads // 2 if heads % 2 == 0 else heads, max_position_embeddings=LENGTH + 1,
        rope_theta=1000.0, tie_word_embeddings=True, initializer_range=0.5 / width**0.5,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One run, before it has been trained."""

    width: int
    ratio: float
    seed: int = 0

    @cached_property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Model(shape(self.width)).parameters())

    @property
    def settings(self) -> Settings:
        """The same batch for all, so that only N and D differ; the learning rate falls with the width."""
        steps = max(1, round(self.ratio * self.parameters / (BATCH * LENGTH)))
        rate, warm_up = 4e-3 * (32 / self.width) ** 0.5, min(50, max(1, steps // 10))
        return Settings(seed=self.seed, steps=steps, batch_size=BATCH, learning_rate=rate, warm_up=warm_up, beta2=0.95)

    @property
    def tokens(self) -> int:
        return self.settings.steps * BATCH * LENGTH


WHOLE = ("width", "seed", "parameters", "tokens")
"""Of the numbers of a Run."""


@dataclass(frozen=True)
class Run:
    """A trained model. loss: on held-out text, nats a token; seconds: of training; epochs: how often it saw the text."""

    width: int
    ratio: float
    seed: int
    parameters: int
    tokens: int
    loss: float
    seconds: float
    epochs: float

    @classmethod
    def read(cls, record: dict) -> Run:
        """From JSON; TypeError unless it has these numbers and no others."""
        for name, value in record.items():
            if not (is_count(value, 0) if name in WHOLE else is_number(value)):
                raise TypeError(f"{name} is {value!r}")
        return cls(**record)

    @property
    def plan(self) -> Plan:
        return Plan(self.width, self.ratio, self.seed)


def trained(plan: Plan, data: bytes, device: torch.device, advance: Callable[[int], object] = lambda tokens: None) -> Run:
    """advance: is told the tokens of every step."""
    task = Text(data, shape(plan.width), plan.seed)
    trainer = Trainer(task, Model(task.config).to(device), plan.settings)
    for _ in range(plan.settings.steps):
        trainer.train_step()
        advance(BATCH * LENGTH)
    loss = task.evaluate(trainer.average.module)
    return Run(plan.width, plan.ratio, plan.seed, plan.parameters, plan.tokens, loss, trainer.seconds, plan.tokens / task.trained_tokens)


def standard_library() -> bytes:
    """The sources of Python's standard library, some 12 MB of text that every machine has, without its tests."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        p
        for p in sorted(folder.rglob("*.py"))
        if not {"site-packages", "dist-packages", "test", "tests"} & set(p.relative_to(folder).parts)
    ]
    return b"\n".join(p.read_bytes() for p in files)


def sizes(text: str) -> list[int]:
    """An argparse type: widths with commas between them."""
    found = [int(word) if word.strip().isdigit() else 0 for word in text.split(",")]
    if not all(width > 0 and width % 16 == 0 for width in found):
        raise argparse.ArgumentTypeError(f"expected multiples of 16 with commas between them, got {text!r}")
    return sorted(set(found))


def several(text: str) -> int:
    """An argparse type: an integer >= 2."""
    if (number := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"expected an integer >= 2, got {text}")
    return number


def ratios(text: str) -> list[float]:
    """An argparse type: numbers > 0 with commas between them."""
    return sorted({amount(word) for word in text.split(",")})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    given = parser.add_argument_group("for a budget (no training)").add_mutually_exclusive_group()
    given.add_argument("--flops", type=amount, metavar="C", help="operations of training, 6 x parameters x tokens")
    given.add_argument("--parameters", type=amount, metavar="N", help="weights of the model")
    given.add_argument("--tokens", type=amount, metavar="D", help="tokens to train on")
    parser.add_argument("--tflops", type=amount, metavar="X", help="of your machines together, in use: adds days of training")
    sweep = parser.add_argument_group("measured here (minutes)")
    sweep.add_argument(
        "--text", type=Path, metavar="FILE", help="what to train on, as bytes (default: the sources of Python's standard library)"
    )
    sweep.add_argument("--widths", type=sizes, default=[16, 32, 48, 64], metavar="N,N", help="of the models (default 16,32,48,64)")
    sweep.add_argument("--ratios", type=ratios, default=[5.0, 10.0, 20.0, 40.0], metavar="X,X", help="tokens a weight (default 5,10,20,40)")
    sweep.add_argument("--seed", type=natural, default=0, metavar="N", help="of weights and order (default 0)")
    sweep.add_argument(
        "--out", type=Path, default=Path("runs/scaling"), metavar="DIR", help="of runs.json and scaling.png (default runs/scaling)"
    )
    sweep.add_argument("--resume", action="store_true", help="keep the runs that --out has, train what is missing")
    sweep.add_argument("--threads", type=thread_count, default=1, metavar="N", help="CPU threads (default 1: these models are small)")
    sweep.add_argument("--draws", type=several, default=100, metavar="N", help="fits that the intervals come from (default 100)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(of_a_sweep={name: parser.get_default(name) for name in OF_A_SWEEP})


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, stderr=args.json)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return _budget(args, console) if args.flops or args.parameters or args.tokens else _sweep(args, console)
    except BrokenPipeError:  # not of a file: whoever read what is printed went away
        raise
    except (BackendError, ScalingError, FitError, TrainingError, OSError) as error:
        print(f"fastprimer scaling: error: {error}", file=sys.stderr)
        return 2
    except (OverflowError, ZeroDivisionError):
        print("fastprimer scaling: error: a budget beyond the range of floating-point numbers", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastprimer scaling: stopped; --resume keeps the finished runs that are in {args.out / RUNS_FILE}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)


def _budget(args: argparse.Namespace, console: Console) -> int:
    def point(law: Law | Powers) -> tuple[float, float]:
        if args.flops:
            return law.for_flops(args.flops)
        return law.for_parameters(args.parameters) if args.parameters else law.for_tokens(args.tokens)

    for name, default in args.of_a_sweep.items():
        if getattr(args, name) != default:
            raise ScalingError(f"argument --{name}: expected none for a budget, which trains nothing, got {getattr(args, name)}")
    rows = [recommended(name, law, *point(law), args.tflops) for name, law in PUBLISHED.items()]
    if args.json:
        print(json.dumps({"recommended": rows}))
    else:
        console.print(recommendations("compute-optimal training", rows))
        if args.flops:
            console.print("Kaplan et al. fitted N and D each by itself: their 6 N D is not the budget")
    return 0


def _sweep(args: argparse.Namespace, console: Console) -> int:
    keep_freed_memory()
    try:
        data = args.text.read_bytes() if args.text else standard_library()
    except OSError as error:
        raise ScalingError(f"argument --text: expected a file, got {args.text}: {error.strerror}") from None
    plans = [Plan(width, ratio, args.seed) for width in args.widths for ratio in args.ratios]
    text = str(args.text or "Python's standard library")
    about = {"text": text, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "recipe": RECIPE}
    runs = _read(args.out / RUNS_FILE, about) if args.resume else []
    if not args.resume and (args.out / RUNS_FILE).exists():
        console.print(f"starting anew: {args.out / RUNS_FILE} will be replaced (--resume keeps its runs)", markup=False, soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for one in _train(plans, runs, data, prepare_backend("auto"), console):
        runs.append(one)
        record = about | {"runs": [dataclasses.asdict(r) for r in runs]}
        write_atomically(args.out / RUNS_FILE, (json.dumps(record, indent=1) + "\n").encode())
    show([one for one in runs if one.plan in plans], args, console)
    return 0


def _read(path: Path, about: dict) -> list[Run]:
    """The runs of an earlier call, of any sizes; none if there was none."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text())
        if record["sha256"] != about["sha256"]:
            raise ScalingError(f"{path}: expected runs on {about['text']} as it is now, got those of another text")
        if record.get("recipe") != RECIPE:
            raise ScalingError(f"{path}: expected runs of this version's recipe, {RECIPE}, got those of another, {record.get('recipe')}")
        return [Run.read(one) for one in record["runs"]]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScalingError(f"{path}: expected the file of an earlier run, got a broken one ({error})") from None


def _train(plans: list[Plan], done: list[Run], data: bytes, device: torch.device, console: Console) -> Iterator[Run]:
    finished = {one.plan for one in done}
    missing = [plan for plan in plans if plan not in finished]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True) as progress, few_collected():
        bar = progress.add_task("training", total=sum(plan.tokens * plan.parameters for plan in missing))
        for plan in missing:
            progress.update(bar, description=f"{plan.parameters:,} weights, {plan.tokens:,} tokens")
            yield trained(plan, data, device, lambda tokens, each=plan.parameters: progress.advance(bar, tokens * each))
