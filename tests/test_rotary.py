"""Rotary tables: against transformers, against the reference's own formulas, against known values; settings refused by name."""

import math

import pytest
import torch

from fastprimer import reference, rotary
from fastprimer.config import Config, ConfigError, Rope
from fastprimer.rotary import RotaryEmbedding

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
LISTS = {"short_factor": [1 + 0.1 * i for i in range(16)], "long_factor": [1 + 2.0 * i for i in range(16)]}
HALF_LISTS = {name: factors[:8] for name, factors in LISTS.items()}
SCALINGS = {
    "default": {},
    "theta": {"rope_theta": 123.0},
    "linear": {"rope_type": "linear", "factor": 4},
    "linear half": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic 1": {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 100.0},
    "dynamic quarter": {"rope_type": "dynamic", "factor": 8.0, "partial_rotary_factor": 0.25},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 256, "rope_theta": 1e6},
    "yarn betas": {"rope_type": "yarn", "factor": 40.0, "beta_fast": 16, "beta_slow": 2.0, "original_max_position_embeddings": 777},
    "yarn nulls": {"rope_type": "yarn", "factor": 3.0, "beta_fast": None, "beta_slow": None, "mscale": None, "attention_factor": None},
    "yarn untruncated": {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 1000},
    "yarn mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.3, "mscale_all_dim": 0.7, "original_max_position_embeddings": 512},
    "yarn one mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.3, "mscale_all_dim": 0, "original_max_position_embeddings": 512},
    "yarn factor given": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.9, "original_max_position_embeddings": 512},
    "yarn one boundary": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2, "beta_slow": 2, "truncate": False},
    "yarn ratio below 1": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 2048},
    "yarn small theta": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 3.0},
    "yarn short": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    "yarn half": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "partial_rotary_factor": 0.5},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3 70b": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3, "factor": 32.0, "high_freq_factor": 2.0},
    "llama3 half": {"rope_type": "llama3", **LLAMA3, "partial_rotary_factor": 0.5},
    "longrope": {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 256},
    "longrope at 1024": {"rope_type": "longrope", **LISTS, "factor": 4.0},
    "longrope factor": {"rope_type": "longrope", **LISTS, "factor": 16.0, "original_max_position_embeddings": 600},
    "longrope given": {"rope_type": "longrope", **LISTS, "attention_factor": 1.7, "original_max_position_embeddings": 600},
    "longrope half": {"rope_type": "longrope", **HALF_LISTS, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 256},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional factor": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "factor": 3.0, "rope_theta": 1e6},
    "proportional whole": {"rope_type": "proportional"},
}
D, L = 32, 1024
LENGTHS = (200, 1024, 1025, 5000)


def rope_of(scaling):
    return Rope.read(scaling, D, 10000.0, 1.0, L)


def ours(scaling, length):
    embedding = RotaryEmbedding(D, scaling=scaling, max_position_embeddings=L)
    return rotary.frequencies(embedding.rope, length), embedding.attention_factor


def relative_error(got, expected):
    """The largest, in units in the last place of float32; where a frequency is 0, the other must be 0 too."""
    assert got.shape == expected.shape
    assert torch.equal(got == 0, expected == 0)
    ratio = torch.where(expected == 0, 1.0, got.double() / torch.where(expected == 0, 1.0, expected.double()))
    return (ratio - 1).abs().max().item() * 2**23


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install fastprimer[hf])")


def their_config(transformers, scaling):
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **scaling}
    return transformers.Glm4MoeConfig(
        hidden_size=4 * D, num_attention_heads=4, head_dim=D, max_position_embeddings=L, rope_parameters=parameters
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, length, transformers):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    scaling = {"partial_rotary_factor": 1.0, **SCALINGS[name]}  # that architecture's own default is another
    config = their_config(transformers, scaling)
    init = ROPE_INIT_FUNCTIONS.get(config.rope_parameters["rope_type"], Glm4MoeRotaryEmbedding.compute_default_rope_parameters)
    expected, factor = init(config, device="cpu", seq_len=length)
    got, our_factor = ours(scaling, length)
    assert relative_error(got, expected) < 16  # they raise to powers in float32
    assert our_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("length", (200, 1500))
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name, length, transformers):
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    config = their_config(transformers, {"partial_rotary_factor": 1.0, **SCALINGS[name]})
    positions = torch.arange(length)
    expected = Glm4MoeRotaryEmbedding(config)(torch.zeros(1), positions[None])
    got = RotaryEmbedding(D, scaling=config.rope_parameters, max_position_embeddings=L)(positions)
    for table, theirs in zip(got, expected, strict=True):
        theirs = theirs[0].chunk(2, dim=-1)[0]  # both halves are alike
        assert table.shape == theirs.shape and table.dtype == torch.float32
        assert (table - theirs).abs().max() < 16 * length * 2**-23


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_the_references(name, length):
    rope = rope_of(SCALINGS[name])
    got, factor = ours(SCALINGS[name], length)
    expected = torch.tensor([reference.frequency(rope, pair, length) for pair in range(rope.rotary_size // 2)], dtype=torch.float64)
    assert relative_error(got, expected) < 1e-12 * 2**23
    assert factor == pytest.approx(reference.rotary_scale(rope), rel=1e-12)


PLANTED = {
    "a boundary not rounded": ("_yarn_kept", lambda rope, pairs: original_yarn(untruncated(rope), pairs), "yarn"),
    "a ramp the wrong way": ("_yarn_kept", lambda rope, pairs: 1 - original_yarn(rope, pairs), "yarn"),
    "a ramp over wavelengths": ("_llama3_kept", lambda settings, f: original_llama3(settings, f).square(), "llama3"),
    "the length less one": ("frequencies", lambda rope, longest: original(rope, longest - 1), "dynamic"),
    "the switch one later": ("frequencies", lambda rope, longest: original(rope, longest - 1), "longrope at 1024"),
}
original, original_yarn, original_llama3 = rotary.frequencies, rotary._yarn_kept, rotary._llama3_kept


def untruncated(rope):
    return Rope.read({"rope_type": "yarn", **rope.given, "truncate": False}, D, rope.theta, 1.0, L)


@pytest.mark.parametrize("name", PLANTED)
def test_the_comparison_sees_a_planted_bug(name, monkeypatch):
    function, wrong, scaling = PLANTED[name]
    monkeypatch.setattr(rotary, function, wrong)
    rope = rope_of(SCALINGS[scaling])
    expected = torch.tensor([reference.frequency(rope, pair, 1025) for pair in range(D // 2)], dtype=torch.float64)
    assert relative_error(ours(SCALINGS[scaling], 1025)[0], expected) > 100


def plain(theta=10000.0, size=D):
    return torch.tensor([theta ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)


def test_linear_divides_positions():
    stretched = RotaryEmbedding(D, scaling={"rope_type": "linear", "factor": 2})(torch.arange(0, 40, 2))
    torch.testing.assert_close(stretched, RotaryEmbedding(D)(torch.arange(20)), rtol=0, atol=1e-5)


def test_dynamic_keeps_the_fastest_pair_and_interpolates_the_slowest():
    for length, scale in ((10, 1), (L, 1), (2 * L, 5), (3 * L, 9)):  # factor 4: 4 T / L - 3
        f, _ = ours({"rope_type": "dynamic", "factor": 4.0}, length)
        assert f[0] == 1
        assert f[-1].item() == pytest.approx(plain()[-1].item() / scale, rel=1e-12)
        assert (scale > 1) == bool((f[1:] < plain()[1:] * 0.99).all())


@pytest.mark.parametrize("name", ("dynamic", "longrope at 1024"))
def test_the_length_is_the_greatest_position_and_one(name):
    embedding = RotaryEmbedding(D, scaling=SCALINGS[name], max_position_embeddings=L)
    for last in (L - 1, L):
        tables = embedding(torch.tensor([7, last, 0]))
        torch.testing.assert_close(tables, embedding(torch.tensor([7, last, 0]), longest=last + 1), rtol=0, atol=0)
        torch.testing.assert_close(tables[0][0], embedding(torch.tensor([7]), longest=torch.tensor(last + 1))[0][0], rtol=0, atol=0)
        unscaled = embedding(torch.tensor([7]))[0][0]
        assert torch.equal(tables[0][0], unscaled) == (last < L)


def test_llama_3_1_keeps_28_pairs_and_interpolates_30():
    published = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192}
    ratio = rotary.frequencies(Rope.read(published, 128, 5e5, 1.0, 131072), 1) / plain(5e5, 128)
    torch.testing.assert_close(ratio[:29], torch.ones(29, dtype=torch.float64))  # at least 4 turns on 8192 positions
    torch.testing.assert_close(ratio[35:], torch.full((29,), 1 / 8, dtype=torch.float64))  # at most one
    assert (ratio[28:36].diff() < 0).all()


def test_yarn_of_llama_2_ramps_from_pair_20_to_46():
    published = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    embedding = RotaryEmbedding(128, scaling=published, max_position_embeddings=65536)
    ratio = rotary.frequencies(embedding.rope, 1) / plain(size=128)
    expected = torch.tensor([1 - 15 / 16 * min(1, max(0, (i - 20) / 26)) for i in range(64)], dtype=torch.float64)
    torch.testing.assert_close(ratio, expected)
    assert embedding.attention_factor == pytest.approx(1.2772588722239781)  # 0.1 ln 16 + 1
    cos, sin = embedding(torch.arange(50))
    torch.testing.assert_close(torch.hypot(cos, sin), torch.full((50, 64), 1.2772588722239781))


def test_longrope_of_phi_3_changes_its_factors_after_the_original_length():
    scaling = {"rope_type": "longrope", **LISTS, "original_max_position_embeddings": 256}
    for length, field in ((256, "short_factor"), (257, "long_factor")):
        f, factor = ours(scaling, length)
        torch.testing.assert_close(f, plain() / torch.tensor(LISTS[field], dtype=torch.float64))
        assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(256)))


def test_proportional_leaves_pairs_of_the_whole_head_at_rest():
    cos, sin = RotaryEmbedding(D, scaling={"rope_type": "proportional", "partial_rotary_factor": 0.25})(torch.arange(50))
    assert cos.shape == (50, D // 2)
    torch.testing.assert_close((cos[:, :4], sin[:, :4]), tuple(t[:, :4] for t in RotaryEmbedding(D)(torch.arange(50))))
    assert (cos[:, 4:] == 1).all() and (sin[:, 4:] == 0).all()


def test_partial_rotates_the_first_features_as_a_smaller_head():
    got = RotaryEmbedding(D, 100.0, partial_rotary_factor=0.75)(torch.arange(9))
    torch.testing.assert_close(got, RotaryEmbedding(24, 100.0)(torch.arange(9)), rtol=0, atol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_no_state_and_tables_of_float32_at_least(name):
    embedding = RotaryEmbedding(D, scaling=SCALINGS[name], max_position_embeddings=L)
    assert not embedding.state_dict() and not list(embedding.buffers())
    positions = torch.tensor([0, 3, 1999])
    truth = embedding(positions, torch.float64)
    rounded = embedding.to(torch.bfloat16)(positions, torch.bfloat16)
    for table, exact in zip(rounded, truth, strict=True):
        assert table.dtype == torch.float32 and exact.dtype == torch.float64
        assert (table - exact).abs().max() < 2000 * 2**-23
    assert all(t.shape == (0, t.shape[1]) for t in embedding(positions[:0]))


@pytest.mark.parametrize("name", SCALINGS)
def test_both_ways_of_writing_are_one(name):
    inside = SCALINGS[name]
    old = {k: v for k, v in inside.items() if k not in ("rope_theta", "partial_rotary_factor", "rope_type")}
    old = {"type": inside["rope_type"], **old} if "rope_type" in inside else None
    theta, partial = inside.get("rope_theta", 10000.0), inside.get("partial_rotary_factor", 1.0)
    embedding = RotaryEmbedding(D, theta, old, partial_rotary_factor=partial, max_position_embeddings=L)
    assert embedding.rope == rope_of(inside)
    sizes = dict(vocab_size=50, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4)
    fields = {**sizes, "head_dim": D, "max_position_embeddings": L}
    new = Config.from_dict({**fields, "rope_parameters": inside})
    assert new == Config.from_dict({**fields, "rope_theta": theta, "rope_scaling": old, "partial_rotary_factor": partial})
    assert new == Config.from_dict(new.to_dict()) == Config(**fields, rope_scaling=inside)
    assert RotaryEmbedding.from_config(new).rope == embedding.rope


def test_an_original_length_outside_of_the_scaling_counts():
    sizes = dict(vocab_size=50, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4)
    given = {**sizes, "original_max_position_embeddings": 256, "max_position_embeddings": L}
    assert (
        Config.from_dict({**given, "rope_scaling": {"type": "yarn", "factor": 4.0}}).rope.settings
        == rope_of({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}).settings
    )
    assert Config.from_dict({**given, "rope_scaling": {"type": "linear", "factor": 4.0}}).rope.settings == {"factor": 4.0}


WRONG = {
    "no object": ("linear", "rope_scaling: expected an object or null, got 'linear'"),
    "unknown type": ({"rope_type": "mrope"}, "rope_type: expected one of default, linear, .*, got 'mrope'"),
    "odd type": ({"rope_type": ["linear"]}, "rope_type: expected one of default, "),
    "unknown field": ({"rope_type": "linear", "factor": 2, "mrope_section": [1]}, r"mrope_section: expected only factor .*got \[1\]"),
    "field of default": ({"rope_type": "default", "factor": 2}, "factor: expected only no fields for the type 'default', got 2"),
    "layer types": ({"full_attention": {"rope_type": "default"}}, "rope_scaling: full_attention"),
    "linear without factor": ({"rope_type": "linear"}, "factor: expected a number >= 1 for the type 'linear', got None"),
    "dynamic null": ({"rope_type": "dynamic", "factor": None}, "factor: expected a number >= 1, got None"),
    "small factor": ({"rope_type": "linear", "factor": 0.5}, "factor: expected a number >= 1, got 0.5"),
    "text": ({"rope_type": "linear", "factor": "2"}, "factor: expected a number >= 1, got '2'"),
    "infinite": ({"rope_type": "linear", "factor": math.inf}, "factor: expected a number >= 1, got inf"),
    "yarn without factor": ({"rope_type": "yarn"}, "factor: expected a number >= 1 or null for the type 'yarn'"),
    "yarn truncate": ({"rope_type": "yarn", "factor": 2, "truncate": None}, "truncate: expected true or false, got None"),
    "yarn betas": ({"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, "beta_fast: expected a number >= beta_slow = 2"),
    "yarn theta": ({"rope_type": "yarn", "factor": 2, "rope_theta": 1}, "rope_theta: expected a number > 1, got 1"),
    "yarn attention": ({"rope_type": "yarn", "factor": 2, "attention_factor": 0}, "attention_factor: expected a number > 0 or null"),
    "llama3 without": ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor: expected a number > 0 for the type 'llama3', got None"),
    "llama3 order": ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor: expected a number > low_freq_factor"),
    "original": ({"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 1.5}, "original_max_position_embeddings"),
    "longrope without": ({"rope_type": "longrope", "short_factor": LISTS["short_factor"]}, "long_factor: expected a list"),
    "longrope length": ({"rope_type": "longrope", **HALF_LISTS}, "short_factor: expected 16 numbers, .*, got 8"),
    "longrope zero": ({"rope_type": "longrope", **LISTS, "long_factor": [0] * 16}, "long_factor: expected a list of numbers > 0"),
    "partial": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected a number > 0, at most 1, got 1.5"),
    "odd": ({"partial_rotary_factor": 0.1}, "partial_rotary_factor: expected an even number >= 2 .* head_dim = 32, got 0.1"),
    "none": ({"partial_rotary_factor": 0.01}, "partial_rotary_factor: expected an even number >= 2"),
    "two": ({"rope_type": "dynamic", "factor": 2, "partial_rotary_factor": 0.07}, "rope_type: expected another one for 2 rotary"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused_by_name(name):
    scaling, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        RotaryEmbedding(D, scaling=scaling)
    sizes = dict(vocab_size=50, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4)
    for field in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ConfigError, match=message):
            Config.from_dict({**sizes, field: scaling})


@pytest.mark.slow
@pytest.mark.parametrize("name", ("default", "dynamic", "yarn", "llama3", "longrope", "proportional"))
def test_compiles_into_one_graph(name):
    embedding = RotaryEmbedding(D, scaling=SCALINGS[name], max_position_embeddings=L)
    positions = torch.arange(1500)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(positions), embedding(positions))


def test_wrong_arguments_are_refused_by_name():
    for arguments, name in (((7,), "head_dim"), ((0,), "head_dim"), ((8, 0.0), "rope_theta"), ((8, None), "rope_theta")):
        with pytest.raises(ConfigError, match=name):
            RotaryEmbedding(*arguments)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        RotaryEmbedding(8, max_position_embeddings=0)
