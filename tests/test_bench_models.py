"""`fastprimer bench` beyond single operations: whole models, cost over size, memory. What it says is tested, not how fast it is."""

import ctypes
import itertools
import json
import platform
import re
import subprocess
import sys
import types

import pytest
import torch

from fastprimer import cli, layers, ops, reference
from fastprimer.backends import BackendError, explain, unavailable
from fastprimer.benchmark import contest, growth, jobs, models, roofs, tables, timing
from fastprimer.benchmark.models import DECODING, TRAINING, ModelCase
from fastprimer.benchmark.rows import Results, Row
from fastprimer.benchmark.timing import Timing
from fastprimer.cases import rms_norm_case
from fastprimer.config import Config
from fastprimer.memory import extra_resident_bytes
from fastprimer.model import Model

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "dense": Config(**SIZES),
    "tied": Config(**SIZES, tie_word_embeddings=True),
    "moe": Config(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def case(name):
    return ModelCase(name, CONFIGS[name], batch=2, length=9, streams=3, cached=17)


@pytest.fixture
def small(monkeypatch):
    """Measured in a fraction of a second, against a small copy."""
    if reason := unavailable("rms_norm", "cpu", "cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(roofs, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(roofs, "LARGEST_PRODUCT", {"cpu": 64})
    monkeypatch.setattr(roofs, "SMALLEST_PRODUCT", 64)
    for cached in (roofs._copies, roofs._product):
        cached.cache_clear()
    yield
    for cached in (roofs._copies, roofs._product):
        cached.cache_clear()


def settings(*peers):
    return contest.Settings("cpu", 3, 0, list(peers))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_trains_and_decodes_beside_its_peers(small, name):
    pytest.importorskip("transformers")
    measured = list(models.measure_model(case(name), torch.float32, "cpu", (TRAINING, DECODING), settings("eager", "transformers")))
    training, decoding = measured
    assert not training.wrong and not training.left_out and set(training.peers) == {"eager", "transformers"}
    assert not decoding.wrong and not decoding.left_out and set(decoding.peers) == {"transformers"}  # the plain model has no cache
    assert all(row.bytes > 0 and row.flops > 0 and row.of_roof > 0 and len(row.ours.samples) == 3 for row in measured)
    assert [(row.name, row.measured) for row in measured] == [(f"model {name}", TRAINING), (f"model {name}", DECODING)]


def test_a_wrong_model_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(layers.RMSNorm, "forward", lambda self, x, residual=None: ops.rms_norm(x, self.weight, 1e-4, residual=residual))
    rows = list(models.measure_model(case("dense"), torch.float32, "cpu", (TRAINING, DECODING), settings()))
    assert all(row.wrong and row.ours is None for row in rows)
    assert any("logits: error is" in problem for problem in rows[0].wrong)


def test_a_model_that_computes_something_else_is_no_peer(small, monkeypatch):
    plain = reference.MLP.forward
    monkeypatch.setattr(models, "_proof", lambda *_: [])
    monkeypatch.setattr(reference.MLP, "forward", lambda self, x: 1.01 * plain(self, x))
    (row,) = models.measure_model(case("dense"), torch.float32, "cpu", (TRAINING,), settings("eager"))
    assert "computes something else" in row.left_out["eager"] and row.ours and not row.peers


@pytest.mark.parametrize("name", CONFIGS)
def test_the_work_of_a_model_is_what_its_weights_say(name):
    config, made = CONFIGS[name], Model(CONFIGS[name])
    matrices = {n: p for n, p in made.named_parameters() if p.dim() > 1 and ("embed" not in n or config.tie_word_embeddings)}
    stored = sum(p.numel() for p in matrices.values())
    used = sum(p.numel() // (2 if "experts" in n else 1) for n, p in matrices.items())  # two of four experts
    heads = config.num_hidden_layers * config.hidden_size
    untied = 0 if config.tie_word_embeddings else made.model.embed_tokens.weight.numel()
    assert case(name).work(TRAINING, 4) == (40 * (stored + untied), 6 * 2 * 8 * used + 12 * 2 * (8 * 9 // 2) * heads)
    cache = 3 * 17 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    assert case(name).work(DECODING, 2) == (2 * (stored + cache), 3 * 2 * used + 3 * 4 * 17 * heads)  # 3 x 2 choices reach all 4 experts


def test_a_training_step_leaves_the_weights_and_a_token_the_cache(small):
    torch.manual_seed(0)
    weights = Model(CONFIGS["dense"]).state_dict()
    tokens = torch.randint(61, (2, 9))
    step = models._training_call(lambda: Model(CONFIGS["dense"]), weights, tokens)
    first, second = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and len(first) == 1 + len(weights)
    token = models._decoding_call(lambda: Model(CONFIGS["dense"]), weights, tokens)
    assert torch.equal(token(), token())
    with torch.no_grad():
        whole = models._with_weights(lambda: Model(CONFIGS["dense"]), weights)(tokens)[:, -1]
    torch.testing.assert_close(token(), whole)


def test_transformers_keeps_its_frequencies_in_float32():
    """Cast with the weights they turned positions in the thousands by other angles, and the peer computed something else."""
    pytest.importorskip("transformers")
    weights = {name: t.bfloat16() for name, t in Model(CONFIGS["dense"]).state_dict().items()}
    theirs = models._with_weights(lambda: models._Transformers(CONFIGS["dense"]), weights)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in theirs.buffers() if b.is_floating_point()} == {torch.float32}


def test_memory_of_a_call():
    got = extra_resident_bytes(lambda: torch.ones(1 << 24))
    if got is None:
        pytest.skip("needs glibc and Linux's /proc")
    assert got == pytest.approx(1 << 26, rel=0.05)
    assert extra_resident_bytes(lambda: None) < 1 << 20
    staged = timing.Staged(lambda: (torch.ones(1 << 24), lambda: torch.ones(1 << 22))[1])
    assert timing.peak_megabytes(staged, "cpu") == pytest.approx((1 << 24) / 1e6, rel=0.1)
    x = torch.ones(1 << 22, requires_grad=True)
    gradient = timing.prepared(lambda x: x * 2, {"x": x}, timing.BACKWARD)
    assert timing.peak_megabytes(gradient, "cpu") == pytest.approx((1 << 24) / 1e6, rel=0.1)


INHERITED_HEAP = """
from concurrent.futures import ThreadPoolExecutor
import torch
from fastprimer.memory import extra_resident_bytes, keep_freed_memory
keep_freed_memory()
with ThreadPoolExecutor(1) as thread:
    held = thread.submit(lambda: [torch.ones(n) for n in [1 << 20, 1 << 8] * 5 + [1 << 20] * 10]).result()
held = [t for t in held if t.numel() == 1 << 8]
print([extra_resident_bytes(lambda: [torch.ones(1 << 20).dim(), torch.ones(1 << 22)]) for _ in range(16)])
"""


def test_memory_of_a_call_by_a_thread_that_inherits_a_heap():
    """What an ended thread had freed between small blocks served the call, and stayed resident beside what the call took later."""
    if extra_resident_bytes(lambda: None) is None:
        pytest.skip("needs glibc and Linux's /proc")
    out = subprocess.run([sys.executable, "-c", INHERITED_HEAP], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == pytest.approx([1 << 24] * 16, rel=0.05)


EMPTIED_HEAP = """
import ctypes, resource
import torch
from fastprimer.memory import keep_freed_memory, populate_kept_memory
keep_freed_memory()
ctypes.CDLL(None).malloc_trim(0)
populate_kept_memory(1 << 27)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 23), torch.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_kept_memory_is_mapped_before_anything_is_timed():
    if not hasattr(ctypes.CDLL(None), "malloc_trim") or [int(n) for n in re.findall(r"\d+", platform.release())[:2]] < [5, 14]:
        pytest.skip("needs glibc and madvise(MADV_POPULATE_WRITE)")
    out = subprocess.run([sys.executable, "-c", EMPTIED_HEAP], capture_output=True, text=True, check=True).stdout
    assert int(out) < 1000  # of 16384 pages


@pytest.mark.parametrize(
    "flops, moved, warm, staged",
    [(10**8, 10**6, False, True), (10**8, 10**7, False, False), (10**10, 10**6, False, False), (0, 1, True, True)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_short_arithmetic_calls_are_timed_after_10_ms_of_their_own(flops, moved, warm, staged, device, monkeypatch):
    timed = {}

    def record(calls, *_, **__):
        timed.update(calls)
        return {name: [1.0] * 7 for name in calls}

    monkeypatch.setattr(contest, "interleaved", record)
    monkeypatch.setattr(contest.roofs, "roofs", lambda *_: roofs.Roofs({"copy": lambda: None}, {}, {"copy": 1}))
    monkeypatch.setattr(contest, "peak_megabytes", lambda *_: None)
    monkeypatch.setattr(contest, "host_microseconds", lambda *_: None)
    called = []
    row = Row("attention", "", "float32", timing.FORWARD, "cpu", bytes=moved, flops=flops)
    contest.contest(row, lambda: called.append(1) or torch.ones(1), {}, contest.Settings(device, 7), warm=warm)
    before, clock = len(called), itertools.count(step=4e-3)  # a look at it every 4 ms
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    timing._ready(timed["ours"])
    assert len(called) - before == (3 if staged and device == "cpu" else 0)


def point(size: int, ours: float, eager: float, **more) -> Row:
    timings = {"ours": Timing.of([ours] * 6), "peers": {"eager": Timing.of([eager] * 6)}, "peak_mb": {"ours": size / 100, "eager": ours}}
    series = {
        "series": "attention causal",
        "letter": "S",
        "size": size,
        "copy_gb_per_s": 20.0,
        "of_roof": 0.5,
        "bytes": 1,
        "roof_samples": [1.0],
    }
    return Row("attention", f"causal S {size}", "float32", "forward+backward", "cpu", **timings, **(series | more))


def test_exponents():
    def exponent(points):
        return tables.Curve("a series", "S", "float32", "forward", "cpu", "ours", "ms", tuple(points)).exponent

    assert exponent((n, 7 * n**2) for n in (4, 8, 16)) == pytest.approx(2)
    assert exponent([(1, 99.0), *((n, n**1.5) for n in (4, 8, 16))]) == pytest.approx(1.5)  # through the last three
    assert exponent([(4, 1.0), (8, 2.0)]) is None and exponent((n, 0.0) for n in (4, 8, 16)) is None


def test_no_backend_is_left_in_force_while_a_row_is_shown(small):
    for _ in models.measure_model(case("dense"), torch.float32, "reference", (TRAINING,), settings()):
        assert explain("rms_norm", torch.randn(2, 8)).backend == "cpu"


def test_the_table_and_the_page_of_a_series(tmp_path):
    rows = [point(S, S**2 / 1e4, S**2 / 1e3) for S in (512, 1024, 2048)]
    table = tables.growth(rows)
    assert "| S 512 | S 1024 | S 2048 | exponent |" in table and len(table.splitlines()) == 6
    assert re.search(r"\| attention causal \| float32 \| forward\+backward \| ours \| ms \| 26.21 \| 104.86 \| 419.43 \| 2.00 \|", table)
    assert re.search(r"\| ours \| MB \| 5.12 \| 10.24 \| 20.48 \| 1.00 \|", table)
    (line,) = tables.exponents(rows)
    assert line == "attention causal fp32 both: time grows with S to the power of ours 2.00, eager 2.00"
    about = {"device": "a processor", "torch": "2.13", "commit": "abc", "date": "2026-01-01T00:00:00", "memory": "kept"}
    Results(about, rows).write(tmp_path / "g.json")
    assert cli.main(["report", "--results", str(tmp_path / "g.json"), "--out", str(tmp_path / "p.html"), "--folder", str(tmp_path)]) == 0
    page = (tmp_path / "p.html").read_text()
    assert 'id="growth-attention-causal-S-float32-cpu-1-figure_1"' in page and "attention causal over S" in page


def test_a_series_is_measured_point_by_point(small, monkeypatch, tmp_path, capsys):
    one = growth.Series("rms_norm", "", "C", (16, 32, 64), lambda C: rms_norm_case("", 8, C, bench=True))
    number = growth.Series("rms_norm", "", growth.THREADS, (1, 2), lambda _: rms_norm_case("", 8, 16, bench=True))
    monkeypatch.setattr(jobs, "series", lambda: [one, number])
    before = torch.get_num_threads()
    wanted = ["--growth", "--dtype", "float32", "--peers", "eager", "--rounds", "3", "--memory", "fresh", "--out", str(tmp_path / "g.json")]
    assert cli.main(["bench", *wanted]) == 0
    rows = Results.read(tmp_path / "g.json").rows
    assert [(r.series, r.letter, r.size, r.case) for r in rows[:2]] == [("rms_norm", "C", 16, "C 16"), ("rms_norm", "C", 32, "C 32")]
    assert [r.size for r in rows] == [16, 32, 64, 1, 2] and torch.get_num_threads() == before
    assert "rms_norm fp32 both: time grows with C" in capsys.readouterr().out


def test_the_series_cover_every_letter():
    every = growth.series()
    assert {one.letter for one in every} == {"S", "T", "C", "E", "V", growth.THREADS}
    assert len({(str(one), one.letter) for one in every}) == len(every)
    for one in every:
        made = one.case(one.sizes[0])
        assert made.op == one.op and made.work is not None


def test_whole_models_on_a_gpu_are_measured_as_users_have_them():
    """Experts by one backend, attention by another."""
    found = jobs.jobs("cuda", jobs.Choice(ops=[models.MODEL], dtypes=["bfloat16"]))
    assert {job.backend for job in found} == {"auto"}


def test_a_case_is_chosen_by_its_name_or_by_what_is_in_many():
    def chosen(text):
        return [job.what for job in jobs.jobs("cuda", jobs.Choice(ops=[models.MODEL], dtypes=["bfloat16"], case=text))]

    assert chosen("llama-1b") == ["model-llama-1b"]
    assert chosen("llama") == ["model-llama-1b", "model-llama-1b-alone"]


def test_what_is_asked_for_twice_is_measured_once_and_a_case_is_a_size_too():
    choice = jobs.Choice(
        ops=["route", "route"], backends=["reference"] * 2, dtypes=["float32"] * 2, growth=True, passes=["forward+backward"] * 2
    )
    assert [job.what for job in jobs.jobs("cpu", choice)] == [f"route E {size}" for size in (8, 16, 32, 64, 128, 256)]
    choice = jobs.Choice(ops=["attention", "route"], backends=["reference"], dtypes=["float32"], growth=True, case="window S")
    assert {job.what.rpartition(" ")[0] for job in jobs.jobs("cpu", choice)} == {"attention window S"}
    with pytest.raises(BackendError, match="of this choice of --case, --backend, --growth and --pass here"):
        jobs.jobs("cpu", jobs.Choice(ops=["route"], growth=True, case="nonsense"))


def test_half_types_of_products_are_left_out_where_they_have_no_instructions(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert jobs.usual_dtypes("moe", "cpu") == ("float32",) and jobs.usual_dtypes("rope", "cpu") == ("float32", "bfloat16")
    assert jobs.usual_dtypes("moe", "cuda") == ("float32", "bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert jobs.usual_dtypes("moe", "cpu") == ("float32", "bfloat16")
