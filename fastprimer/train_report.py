"""What `fastprimer train` shows: text and a progress bar for people, or one JSON object a line for programs."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastprimer import ops
from fastprimer.backends import PREFERENCE, BackendError, Explanation, explain, interpreting, load_emulator
from fastprimer.checkpoint import write_atomically
from fastprimer.config import Config
from fastprimer.terminal import Console

SIMULATORS = {"triton": "Triton's interpreter", "cuda": "the emulator"}
"""What runs the kernels of a GPU where there is none."""


def prepare_backend(name: str) -> torch.device:
    """The device to train on with a backend; without a GPU, Triton's interpreter or the CUDA emulator is made ready."""
    if torch.cuda.is_available():
        return torch.device("cpu" if name == "cpu" else "cuda")
    if name == "cuda":
        load_emulator()
    if name == "triton":
        if "triton" not in sys.modules:
            os.environ.setdefault("TRITON_INTERPRET", "1")
        if importlib.util.find_spec("triton") is None:
            raise BackendError("the package triton is not installed")
        if not interpreting():
            raise BackendError("without a GPU, Triton kernels need its interpreter: set TRITON_INTERPRET=1 in the environment")
    return torch.device("cpu")


def is_simulated(backend: str, device: torch.device) -> bool:
    """Whether GPU kernels are run on the CPU."""
    return backend in SIMULATORS and device.type == "cpu"


def serving(config: Config, device: torch.device) -> dict[str, Explanation]:
    """Which backend serves each operation of a model of this shape.

    Raises:
        BackendError: the backend in force has a kernel for an operation and cannot serve it.
    """
    batch, length, heads, kv_heads = 2, 8, config.num_attention_heads, config.num_key_value_heads

    def zeros(*shape):
        return torch.zeros(shape, device=device)

    x, q = zeros(batch, length, config.hidden_size), zeros(batch, length, heads, config.head_dim)
    k, table = zeros(batch, length, kv_heads, config.head_dim), zeros(length, config.head_dim // 2)
    gate, rows = zeros(batch, length, config.intermediate_size), x.flatten(0, 1)
    embedding, target = zeros(config.vocab_size, config.hidden_size), torch.zeros(len(rows), dtype=torch.int64, device=device)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    window = None if config.sliding_window is None else (config.sliding_window - 1, 0)
    found = {
        "rms_norm": explain(ops.rms_norm, x, zeros(config.hidden_size), config.rms_norm_eps, residual=x),
        "rope": explain(ops.rope, q, k, table, table),
        "attention": explain(ops.attention, q, k, k, causal=True, window=window),
        "attention_with_kv_cache": explain(ops.attention_with_kv_cache, q[:, :1], k, k, lengths, window=window),
    }
    if config.is_moe:
        weights, experts = zeros(len(rows), config.num_experts_per_tok), torch.arange(config.num_experts_per_tok, device=device)
        gate_up = zeros(config.num_local_experts, 2 * config.intermediate_size, config.hidden_size)
        down = zeros(config.num_local_experts, config.hidden_size, config.intermediate_size)
        found["route"] = explain(ops.route, zeros(len(rows), config.num_local_experts), config.num_experts_per_tok)
        found["moe"] = explain(ops.moe, rows, gate_up, down, weights, experts.expand(len(rows), -1))
    else:
        found["swiglu"] = explain(ops.swiglu, gate, gate)
    found["linear_cross_entropy"] = explain(ops.linear_cross_entropy, rows, embedding, target)
    for op, explanation in found.items():
        if explanation.backend is None:
            raise BackendError(f"no backend serves {op}: {explanation}")
    return found


class Report:
    def __init__(self, args: argparse.Namespace, every: int):
        self.json, self.backend, self.model, self.every = args.json, args.backend, args.model, every
        self.console = Console(highlight=False)

    def _event(self, event: str, **fields) -> None:
        print(json.dumps({"event": event, **fields}), flush=True)

    def start(self, trainer, served_by: dict[str, Explanation], path: Path) -> None:
        config, settings = trainer.task.config, trainer.settings
        parameters = sum(p.numel() for p in trainer.parameters.values())
        simulated = is_simulated(self.backend, trainer.device) and self.model == "fast"
        servers = {op: explanation.backend for op, explanation in served_by.items()}
        if self.json:
            shape = {"task": trainer.task.name, "parameters": parameters, "model": self.model, "config": config.to_dict()}
            run = {"seed": settings.seed, "steps": settings.steps, "step": trainer.step, "batch_size": settings.batch_size}
            self._event("start", **shape, **run, learning_rate=settings.learning_rate, backend=self.backend, served_by=servers)
            return
        say = self.console.print
        say(f"[bold]{trainer.task.name}[/]: {parameters:,} weights, {len(trainer.task.tokens):,} examples, seed {settings.seed}")
        experts = f" in each of {config.num_local_experts} experts, {config.num_experts_per_tok} a word" if config.is_moe else ""
        say(
            f"width {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} query and "
            f"{config.num_key_value_heads} key/value heads of {config.head_dim}, feed-forward {config.intermediate_size}{experts}, "
            f"{config.vocab_size} words; batch {settings.batch_size}, AdamW at {settings.learning_rate}, "
            f"{torch.get_num_threads()} threads on {trainer.device}",
            soft_wrap=True,
        )
        if trainer.step:
            say(f"resumed after step {trainer.step} of {settings.steps}")
        elif path.exists():
            say(f"starting anew: {path} will be replaced (--resume continues it)", markup=False, soft_wrap=True)
        if self.model == "reference":
            say("model: fastprimer.reference, plain torch; no operation of fastprimer takes part")
        else:
            for line in self._serving_lines(served_by, trainer.device):
                say(line, soft_wrap=True)
        if simulated:
            how = f"{self.backend} kernels run in {SIMULATORS[self.backend]} here (no GPU)"
            say(f"[yellow]{how}: slow, try --steps 2; evaluation runs on auto[/]", soft_wrap=True)

    def _serving_lines(self, served_by: dict[str, Explanation], device: torch.device) -> Iterator[str]:
        """Who serves each operation, and why not whom one would expect."""
        wanted = PREFERENCE[device.type][0] if self.backend == "auto" else self.backend
        for op, explanation in served_by.items():
            reason = explanation.refusals.get(wanted, "").removeprefix(f"{op} has ") if explanation.backend != wanted else ""
            yield f"  {op:24} {explanation.backend:10} {reason}".rstrip()

    def samples(self, when: str, samples: list[tuple[str, bool, str, float]]) -> None:
        """Prompts, whether the model is trained on them, its answers and their probabilities."""
        if not self.json:
            self.console.print(f"[bold]{when} training[/]")
        for prompt, trained, text, probability in samples:
            if self.json:
                self._event("sample", when=when, prompt=prompt, trained=trained, answer=text, probability=probability)
            else:
                kind = "trained" if trained else "unseen"
                self.console.print(f'  "{prompt}" -> "{text}"  ({kind}, probability {probability:.1%})', soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, steps: int, done: int) -> Iterator[Callable]:
        """Gives a function to call with the trainer after every step."""
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"), TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        bar = Progress(*columns, console=self.console, disable=self.json)
        task = bar.add_task("", total=steps, completed=done, loss=float("nan"), speed=0.0)

        def advance(trainer) -> None:
            due = trainer.step % self.every == 0 or trainer.step == steps
            if self.json and due:
                fields = {"loss": trainer.recent_loss, "tokens_per_second": trainer.tokens_per_second}
                fields |= {"experts": used} if (used := trainer.utilisation()) else {}
                self._event("progress", step=trainer.step, seconds=trainer.seconds, **fields)
            elif not self.json:
                bar.update(task, completed=trainer.step, loss=trainer.losses[-1], speed=trainer.tokens_per_second)

        with bar:
            yield advance

    def stopped(self, trainer, path: Path, command: str, former: Path | None) -> None:
        """former: the model of an earlier run, which stays until this one has one."""
        if self.json:
            self._event("stopped", step=trainer.step, steps=trainer.settings.steps, checkpoint=str(path), resume=command)
            return
        kept = f"; {former} is an earlier run's" if former else ""
        words = f"stopped after step {trainer.step} of {trainer.settings.steps}{kept}; to go on:\n  {command}"
        self.console.print(words, soft_wrap=True, markup=False)

    def result(self, trainer, measured: dict, files: list[Path], out: Path) -> None:
        """The last words: the loss (a mean over the last steps), the task's own measures, time and speed."""
        if self.json:
            timing = {"seconds": trainer.seconds, "tokens_per_second": trainer.tokens_per_second}
            timing |= {"experts": used} if (used := trainer.utilisation()) else {}
            described = {"backend": self.backend, "model": self.model, "out": str(out), "files": [str(path) for path in files]}
            self._event("result", loss=trainer.recent_loss, **measured, **timing, **described)
            return
        say = self.console.print
        speed = f"{trainer.seconds:.1f} s, {trainer.tokens_per_second:,.0f} tokens/s"
        say(f"loss {trainer.recent_loss:.4f} after {trainer.step} steps; {speed}")
        for line in trainer.task.describe(measured):
            say(f"  {line}")
        for layer, used in trainer.utilisation().items():
            shares = " ".join(f"{count / max(1, sum(used['counts'])):.0%}" for count in used["counts"])
            say(f"  {layer}: experts used {shares} in the last step (entropy {used['entropy']:.2f} of 1)", soft_wrap=True)
        if not any(path.suffix == ".png" for path in files):
            say("no loss curve was drawn: the package matplotlib is not installed (pip install fastprimer[report])", markup=False)
        say(f"written: {out} ({', '.join(path.name for path in files)})", soft_wrap=True, markup=False)
        say(f'try: fastprimer generate --model {shlex.quote(str(out))} "{trainer.task.samples()[0][0]}"', soft_wrap=True, markup=False)


def new_figure(width: float, height: float):
    """A figure of so many inches, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def write_png(figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def write_loss_curve(out: Path, losses: list[float]) -> list[Path]:
    """loss.csv, and loss.png where matplotlib is installed; returns what was written."""
    text = io.StringIO()
    csv.writer(text).writerows([("step", "loss"), *enumerate(losses, 1)])
    write_atomically(out / "loss.csv", text.getvalue().encode())
    figure = new_figure(7, 4)
    if figure is None:
        return [out / "loss.csv"]
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per answer token)", yscale="log", title="training loss")
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.5, alpha=0.4, label="each step")
    width = max(1, len(losses) // 50)
    means = [sum(losses[i : i + width]) / width for i in range(0, len(losses) - width + 1, width)]
    axes.plot([(i + 1) * width for i in range(len(means))], means, label=f"mean of {width} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    write_png(figure, out / "loss.png")
    return [out / "loss.csv", out / "loss.png"]
