"""What a benchmark writes down: one row for every operation, case, dtype, pass and backend, and the file that holds them."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import fastprimer
from fastprimer.benchmark.timing import MODEL_PASSES, PASSES, Timing
from fastprimer.checkpoint import write_atomically

SCHEMA = 2
DTYPES = ("float32", "bfloat16", "float16")
ALL_PASSES = (*PASSES, *MODEL_PASSES)
MEMORY, MATRIX = "memory", "matrix"
OURS = "ours"
"""The contestant that is no peer."""
PACKAGES = ("transformers", "liger-kernel", "triton")
"""Whose versions are written down beside torch's, where they are installed."""


class ResultsError(ValueError):
    """A file of results that cannot be used."""


@dataclass
class Row:
    """Ours and the peers on one case. Nothing is timed where ours is wrong; a peer that is not timed is in `left_out`, with the reason."""

    op: str
    case: str
    dtype: str
    measured: str
    backend: str
    wrong: list[str] = field(default_factory=list)
    ours: Timing | None = None
    peers: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    copy_gb_per_s: float = 0.0
    matrix_gflop_per_s: float | None = None
    limited_by: str = MEMORY
    """The roof that predicts the longer time, `least_ms`."""
    least_ms: float = 0.0
    of_roof: float | None = None
    """least_ms / our median."""
    roof_samples: list[float] = field(default_factory=list)
    """Milliseconds for a GB copied, or a GFLOP computed, by the limiting roof's fastest way: the machine's speed in this run."""
    best_peer: str | None = None
    vs_best_peer: float | None = None
    """The best peer's median / our median: above 1 ours is faster."""
    host_us: dict[str, float] = field(default_factory=dict)
    """Per contestant, on a GPU: the host's time to issue a call."""
    peak_mb: dict[str, float] = field(default_factory=dict)
    """Per contestant: memory needed at most beyond what is there before the call."""
    series: str = ""
    """Of a point of a series over size (benchmark/growth.py): the series, what grows, and how large it is here."""
    letter: str = ""
    size: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.case, self.dtype, self.measured, self.backend

    @property
    def name(self) -> str:
        case = self.case.removeprefix("bench").removeprefix("-")
        return f"{'decoding' if self.op == 'attention_with_kv_cache' else self.op} {case}".strip()

    def judge(self) -> None:
        """What follows from the medians and from the roofs' rates: the limiting roof, our share of it, the best peer."""
        self.limited_by, self.least_ms = MEMORY, self.bytes / self.copy_gb_per_s / 1e6
        arithmetic_ms = self.flops / self.matrix_gflop_per_s / 1e6 if self.matrix_gflop_per_s else 0.0
        if arithmetic_ms > self.least_ms:
            self.limited_by, self.least_ms = MATRIX, arithmetic_ms
        self.of_roof = self.least_ms / self.ours.median
        self.best_peer = min(self.peers, key=lambda name: self.peers[name].median, default=None)
        self.vs_best_peer = self.peers[self.best_peer].median / self.ours.median if self.peers else None

    @classmethod
    def read(cls, record: dict) -> Row:
        row = cls(**record)
        row.ours = row.ours and Timing(**row.ours)
        row.peers = {name: Timing(**timing) for name, timing in row.peers.items()}
        row._check()
        return row

    def _check(self) -> None:
        """What a file may hold that was not written here, and no table can show. Raises ValueError: a field is wrong."""

        def positive(value) -> bool:
            return isinstance(value, (int, float)) and 0 < value < math.inf

        def timed(timing: Timing) -> bool:
            return all(map(positive, (timing.median, timing.low, timing.high, *timing.samples))) and len(timing.samples) > 0

        right = {name: isinstance(getattr(self, name), str) for name in ("op", "case", "backend", "limited_by", "series", "letter")}
        right |= {name: isinstance(getattr(self, name), int) for name in ("bytes", "flops")}
        right |= {"dtype": self.dtype in DTYPES, "measured": self.measured in ALL_PASSES, "left_out": isinstance(self.left_out, dict)}
        right["wrong"] = isinstance(self.wrong, list) and all(isinstance(text, str) for text in self.wrong)
        right["best_peer"] = self.best_peer is None or isinstance(self.best_peer, str)
        right["peak_mb"] = isinstance(self.peak_mb, dict) and all(isinstance(mb, (int, float)) for mb in self.peak_mb.values())
        right["host_us"] = isinstance(self.host_us, dict) and (not self.host_us or isinstance(self.host_us.get(OURS), (int, float)))
        right["size"] = isinstance(self.size, int) and (self.size > 0 or not self.series)
        if self.ours or not self.wrong:
            right |= {name: positive(getattr(self, name)) for name in ("bytes", "copy_gb_per_s", "of_roof")}
            right |= {name: getattr(self, name) is None or positive(getattr(self, name)) for name in ("matrix_gflop_per_s", "vs_best_peer")}
            right["ours"] = self.ours is not None and timed(self.ours)
            right["peers"] = all(map(timed, self.peers.values()))
            right["roof_samples"] = bool(self.roof_samples) and all(map(positive, self.roof_samples))
        for name, fits in right.items():
            if not fits:
                raise ValueError(f"{self.op} {self.case}: {name} is {getattr(self, name)!r:.100}")


def check_writable(path: Path) -> None:
    """Make the folder of a file to come, and refuse a file that cannot be written; what it holds stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise ResultsError(f"argument --out: expected a file that can be written, got {path}: {error.strerror}") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file, in a new folder too, so that a full disk leaves an earlier one as it was; a link stays one, a device is written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(text.encode())
    else:
        write_atomically(path, text.encode())


@dataclass
class Results:
    machine: dict
    rows: list[Row]

    def to_json(self, indent: int | None = None) -> str:
        record = {"schema": SCHEMA, "machine": self.machine, "rows": [asdict(row) for row in self.rows]}
        return json.dumps(_rounded(record), indent=indent)

    def write(self, path: Path) -> None:
        try:
            write_whole(path, self.to_json(indent=1) + "\n")
        except OSError as error:
            raise ResultsError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def parse(cls, text: str, source: str) -> Results:
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ResultsError(f"{source}: expected JSON written by `fastprimer bench --out`, got what is no JSON ({error})") from None
        schema = record.get("schema", "none") if isinstance(record, dict) else "none"
        if schema != SCHEMA:
            raise ResultsError(f"{source}: expected results of schema {SCHEMA}, got schema {schema}: measure again with `fastprimer bench`")
        try:
            about = {key: record["machine"][key] for key in ("device", "torch", "commit", "date")}
            if not all(isinstance(value, str) for value in about.values()):
                raise ValueError(f"machine is {record['machine']!r}")
            return cls(record["machine"], [Row.read(row) for row in record["rows"]])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ResultsError(f"{source}: expected results of schema {SCHEMA}, got a broken record ({error})") from None

    @classmethod
    def read(cls, path: Path) -> Results:
        try:
            return cls.parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ResultsError(f"{path}: expected a file of results, got {getattr(error, 'strerror', error)}") from None


def _rounded(value):
    """Six digits are beyond what any clock here can tell, and keep the files small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def machine(device: str) -> dict:
    """Where and with what a result was measured."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "torch": torch.__version__,
        "fastprimer": fastprimer.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _processor() -> str:
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {instructions}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """Of the checkout this package lies in, with a + where tracked files differ from it; "" without one."""
    return git("describe", "--always", "--dirty=+", "--exclude=*") if in_own_checkout() else ""


def in_own_checkout() -> bool:
    """Whether git keeps this file: an installed copy may lie within the checkout of another project."""
    return git("ls-files", Path(__file__).name) != ""


def git(*command: str) -> str:
    """What git prints about where this package lies; "" if it fails, or is not there."""
    try:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""
