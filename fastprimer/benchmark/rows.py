"""What a benchmark writes down: one row for every operation, case, dtype, pass and backend, and the file that holds them."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastprimer
from fastprimer.benchmark.timing import Timing

SCHEMA = 2
MEMORY, MATRIX = "memory", "matrix"
OURS = "ours"
"""The contestant that is no peer."""


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

    @classmethod
    def read(cls, record: dict) -> Row:
        row = cls(**record)
        row.ours = row.ours and Timing(**row.ours)
        row.peers = {name: Timing(**timing) for name, timing in row.peers.items()}
        return row


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


@dataclass
class Results:
    machine: dict
    rows: list[Row]

    def to_json(self, indent: int | None = None) -> str:
        record = {"schema": SCHEMA, "machine": self.machine, "rows": [asdict(row) for row in self.rows]}
        return json.dumps(_rounded(record), indent=indent)

    def write(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.to_json(indent=1) + "\n")
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
            return cls(record["machine"], [Row.read(row) for row in record["rows"]])
        except (KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"{source}: expected results of schema {SCHEMA}, got a broken record ({error})") from None

    @classmethod
    def read(cls, path: Path) -> Results:
        try:
            return cls.parse(path.read_text(), str(path))
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
    }


def _processor() -> str:
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {instructions}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """Of the checkout this package lies in, with a + where tracked files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""
