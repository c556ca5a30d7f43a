"""The shape of a decoder, under the field names of a Hugging Face config.json.

Every field that shapes the computation is honoured by both models. A config.json that asks for something else (another activation,
biases, another scaling of the rotary embedding ...) is refused by name: a model that silently ignores a setting computes something else
than its author meant. What a config.json leaves out, or has that its model_type knows nothing of, is what transformers makes of it: see
MODEL_TYPES.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field."""


def expect(condition: bool, field: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"config: {field}: expected {expected}, got {got!r}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Rope:
    """All that a model's rotary embedding follows from, checked, and with the defaults of transformers filled in."""

    head_dim: int
    theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    given: dict  # the fields of rope_scaling that were given, but for those that have a name of their own here
    settings: dict  # all fields of this rope_type
    kind: str = "default"
    rotary_size: int = 0
    """R, the features of a head that are rotated; "proportional" forms pairs of all D and leaves some at rest."""
    turning_pairs: int = 0
    """The pairs that are not at rest."""

    @classmethod
    def read(cls, scaling: dict | None, head_dim: int, theta: float, partial_rotary_factor: float, max_position_embeddings: int) -> Rope:
        """From `rope_scaling` and the fields next to it, or from `rope_parameters`, in which transformers 5 keeps all of them.

        What stands inside counts. Raises ConfigError: a field of scaling is unknown, missing or wrong; the message names it.
        """
        expect(scaling is None or isinstance(scaling, dict), "rope_scaling", "an object or null", scaling)
        given = dict(scaling or {})
        kind = given.pop("type", "default")  # its name before it was called rope_type
        kind = given.pop("rope_type", kind)
        expect(isinstance(kind, str) and kind in ROPE_TYPES, "rope_scaling: rope_type", f"one of {', '.join(ROPE_TYPES)}", kind)
        theta = given.pop("rope_theta", theta)
        partial_rotary_factor = given.pop("partial_rotary_factor", partial_rotary_factor)
        expect(is_count(head_dim, 2) and head_dim % 2 == 0, "head_dim", "an even number >= 2", head_dim)
        expect(is_count(max_position_embeddings, 1), "max_position_embeddings", "an integer >= 1", max_position_embeddings)
        least = 1 if kind == "yarn" else 0  # yarn divides by log(theta)
        expect(is_number(theta) and theta > least, "rope_theta", f"a number > {least}", theta)
        fits = is_number(partial_rotary_factor) and 0 < partial_rotary_factor <= 1
        expect(fits, "partial_rotary_factor", "a number > 0, at most 1", partial_rotary_factor)
        settings = _rope_settings(kind, given, max_position_embeddings)
        rotated = head_dim * partial_rotary_factor
        size = head_dim if kind == "proportional" else int(rotated)
        rope = cls(head_dim, theta, partial_rotary_factor, max_position_embeddings, given, settings, kind, size, int(rotated // 2))
        rope._check_sizes()
        return rope

    def _check_sizes(self) -> None:
        size = self.rotary_size
        whole = f"an even number >= 2 of rotary features out of head_dim = {self.head_dim}"
        expect(size >= 2 and size % 2 == 0, "partial_rotary_factor", whole, self.partial_rotary_factor)
        expect(self.kind != "dynamic" or size > 2, "rope_scaling: rope_type", "another one for 2 rotary features", self.kind)
        for field in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            length = len(self.settings[field])
            expect(length == size // 2, f"rope_scaling: {field}", f"{size // 2} numbers, one per pair of rotary features", length)

    @property
    def adaptive(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


def _rope_settings(kind: str, given: dict, max_position_embeddings: int) -> dict:
    known = ROPE_TYPES[kind]
    for field, value in given.items():
        expect(field in known, f"rope_scaling: {field}", f"only {', '.join(known) or 'no fields'} for the type {kind!r}", value)
        description, fits = known[field]
        expect(fits(value), f"rope_scaling: {field}", description, value)
    defaults = ROPE_DEFAULTS.get(kind, {})
    if "original_max_position_embeddings" in known:
        defaults = {"original_max_position_embeddings": max_position_embeddings, **defaults}
    settings = defaults | {field: value for field, value in given.items() if value is not None or field not in defaults}
    for field, (description, _) in known.items():
        expect(field in settings, f"rope_scaling: {field}", f"{description} for the type {kind!r}", None)
    if "factor" in known and settings["factor"] is None:
        settings["factor"] = max_position_embeddings / settings["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        expect(high > low, "rope_scaling: high_freq_factor", f"a number > low_freq_factor = {low}", high)
    if kind == "yarn":
        slow, fast = settings["beta_slow"], settings["beta_fast"]
        expect(fast >= slow, "rope_scaling: beta_fast", f"a number >= beta_slow = {slow}", fast)
    return settings


@dataclass(frozen=True)
class Config:
    """A decoder: Config.preset(name), from_dict, from_json, or its fields. Raises ConfigError (a ValueError), which names the field.

    No model acts by bos_, eos_ and pad_token_id; fastprimer.Model and `generate` take no more tokens than max_position_embeddings."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads; see replace
    head_dim: int | None = None  # None: hidden_size / num_attention_heads; see replace
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # see fastprimer/rotary.py; rope_parameters of transformers 5 is taken too
    partial_rotary_factor: float = 1.0  # the share of a head's features that are rotated
    sliding_window: int | None = None  # a query sees itself and the sliding_window - 1 keys before it
    hidden_act: str = "silu"  # one of HIDDEN_ACTS; a mixture of experts has no other than silu
    qk_norm: bool = False  # RMSNorm on every head of q and k (Qwen3)
    tie_word_embeddings: bool = False
    num_local_experts: int = 0  # 0: a dense feed-forward layer
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True  # the weights of a token's chosen experts sum to one
    initializer_range: float = 0.02
    bos_token_id: int | None = None  # the tokens that begin, end (one or several) and fill up a text: for whoever generates
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "_derived", [f for f in ("num_key_value_heads", "head_dim") if getattr(self, f) is None])
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            self._check_count(field, 1)
        for field in ("num_key_value_heads", "max_position_embeddings", "num_experts_per_tok"):
            self._check_count(field, 1)
        self._check_count("num_local_experts", 0)
        if self.head_dim is None:
            self._check(self.hidden_size % self.num_attention_heads == 0, "hidden_size", f"a multiple of {self.num_attention_heads} heads")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        divides = self.num_attention_heads % self.num_key_value_heads == 0
        self._check(divides, "num_key_value_heads", f"a divisor of num_attention_heads = {self.num_attention_heads}")
        if self.sliding_window is not None:
            self._check_count("sliding_window", 1)
        if self.num_local_experts:
            fits = self.num_experts_per_tok <= self.num_local_experts
            self._check(fits, "num_experts_per_tok", f"at most num_local_experts = {self.num_local_experts}")
        for field in ("qk_norm", "tie_word_embeddings", "norm_topk_prob"):
            self._check(isinstance(getattr(self, field), bool), field, "true or false")
        for field in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, field)
            self._check(is_number(value) and value >= 0, field, "a number >= 0")
        acts = [act for act, name in HIDDEN_ACTS.items() if name == "silu" or not self.is_moe]
        known = isinstance(self.hidden_act, str) and self.hidden_act in acts
        self._check(known, "hidden_act", f"one of {', '.join(acts)}{' in a mixture of experts' if self.is_moe else ''}")
        if isinstance(self.eos_token_id, (list, tuple)):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            several = field == "eos_token_id" and isinstance(value, tuple) and len(value) > 0
            fits = all(is_count(token, -1) for token in (value if several else (value,)))
            self._check(value is None or fits, field, "a token's number" + (", several, or null" if several else " or null"))
        rope = self.rope
        object.__setattr__(self, "rope_theta", rope.theta)
        object.__setattr__(self, "partial_rotary_factor", rope.partial_rotary_factor)
        object.__setattr__(self, "rope_scaling", None if rope.kind == "default" else {"rope_type": rope.kind, **rope.given})

    def _check(self, condition: bool, field: str, expected: str) -> None:
        expect(condition, field, expected, getattr(self, field))

    def _check_count(self, field: str, least: int) -> None:
        self._check(is_count(getattr(self, field), least), field, f"an integer >= {least}")

    def __hash__(self) -> int:  # rope_scaling is a dict
        return hash(self.to_json())

    def replace(self, **changes) -> Config:
        """Another config with some fields changed. What was left out when this one was made, head_dim or num_key_value_heads, follows
        from the new fields; dataclasses.replace, which sees numbers in all of them, would keep the old ones."""
        return dataclasses.replace(self, **dict.fromkeys(self._derived) | changes)

    @cached_property
    def rope(self) -> Rope:
        sizes = self.head_dim, self.rope_theta, self.partial_rotary_factor, self.max_position_embeddings
        return Rope.read(self.rope_scaling, *sizes)

    @property
    def longest_sequence(self) -> int | None:
        """How many tokens a model takes. None: any number, since "dynamic" scaling extends max_position_embeddings as needed."""
        return None if self.rope.kind == "dynamic" else self.max_position_embeddings

    @property
    def is_moe(self) -> bool:
        return self.num_local_experts > 0

    @property
    def model_type(self) -> str:
        """The Hugging Face architecture that computes the same, or "fastprimer" where there is none."""
        if self.rope.rotary_size < self.head_dim:
            return "fastprimer"  # the four below rotate whole heads
        if self.qk_norm:
            return "fastprimer" if self.is_moe or self.sliding_window is not None else "qwen3"
        if self.is_moe:
            return "mixtral" if self.norm_topk_prob else "fastprimer"
        return "llama" if self.sliding_window is None else "mistral"

    @classmethod
    def preset(cls, name: str) -> Config:
        """A well-known shape by name: see PRESETS."""
        if name not in PRESETS:
            raise ConfigError(f"config: preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    @classmethod
    def from_json(cls, path: str | Path) -> Config:
        """Read a Hugging Face config.json."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"config: cannot read {path}: {error}") from error
        if not isinstance(given, dict):
            raise ConfigError(f"config: {path}: expected an object, got {type(given).__name__}")
        return cls.from_dict(given)

    @classmethod
    def from_dict(cls, given: dict) -> Config:
        """Take the fields of a Hugging Face config.json; refuse those that ask for what is not supported.

        Without a model_type every field counts, those left out are as in the constructor, and a field that no config has is refused.
        """
        kind, bare = given.get("model_type", "fastprimer"), "model_type" not in given
        if not isinstance(kind, str) or kind not in MODEL_TYPES:
            raise ConfigError(f"config: model_type: expected one of {', '.join(MODEL_TYPES)}, got {kind!r}")
        defaults, fixed = MODEL_TYPES[kind]
        given = defaults | given | fixed
        given["rope_scaling"] = rope = given.get("rope_scaling") or given.get("rope_parameters")
        original = "original_max_position_embeddings"  # Phi-3 has it outside, where it counts more
        if given.get(original) is not None and isinstance(rope, dict):
            if original in ROPE_TYPES.get(str(rope.get("rope_type", rope.get("type"))), ()):
                given["rope_scaling"] = rope | {original: given[original]}
        if given.get("partial_rotary_factor", 1.0) is None:
            given["partial_rotary_factor"] = 1.0
        layers = given.get("num_hidden_layers")
        layers = layers if is_count(layers, 1) else 0  # what it must be is checked with all other fields
        layer = "full_attention" if given.get("sliding_window") is None else "sliding_attention"
        for field, supported in {**REQUIRED_VALUES, "layer_types": (None, [layer] * layers)}.items():
            if given.get(field, supported[0]) not in supported:
                raise ConfigError(f"config: {field}: only {supported[-1]!r} is supported, got {given[field]!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = given.keys() - names - REQUIRED_VALUES.keys() - OTHER_FIELDS if bare else ()
        if unknown:
            raise ConfigError(f"config: {min(unknown, key=str)}: there is no such field")
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in given]
        if missing:
            raise ConfigError(f"config: {missing[0]}: expected a value, got none")
        return cls(**{name: value for name, value in given.items() if name in names})

    def to_dict(self) -> dict:
        """The fields as a Hugging Face config.json of the same model."""
        architecture = self.model_type.capitalize()
        fields = dataclasses.asdict(self)
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        if not self.is_moe:
            fields = {k: v for k, v in fields.items() if k not in ("num_local_experts", "num_experts_per_tok", "norm_topk_prob")}
        return {"architectures": [f"{architecture}ForCausalLM"], "model_type": self.model_type, **fields}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
MODEL_TYPES = {
    "llama": (TOKENS, {"sliding_window": None, "num_local_experts": 0, "qk_norm": False}),
    "mistral": (
        {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072, **TOKENS},
        {"num_local_experts": 0, "qk_norm": False},
    ),
    "mixtral": (
        {
            "num_local_experts": 8,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            **TOKENS,
        },
        {"norm_topk_prob": True, "qk_norm": False},
    ),
    "qwen3": (
        {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768},
        {"sliding_window": None, "num_local_experts": 0, "qk_norm": True},
    ),
    "fastprimer": ({}, {}),
}
"""{model_type: (transformers' values of fields that are left out, where Config's are others; values that this architecture has whatever
is given)}"""

HIDDEN_ACTS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""{hidden_act: the activation of fp.swiglu}"""

_FACTOR = "a number >= 1", lambda value: is_number(value) and value >= 1
_POSITIVE = "a number > 0", lambda value: is_number(value) and value > 0
_FACTORS = "a list of numbers > 0", lambda value: isinstance(value, list) and all(_POSITIVE[1](number) for number in value)
_FLAG = "true or false", lambda value: isinstance(value, bool)
_ORIGINAL = {"original_max_position_embeddings": ("an integer >= 2", lambda value: is_count(value, 2))}


def _or_null(description, fits):
    return f"{description} or null", lambda value: value is None or fits(value)


ROPE_TYPES = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "dynamic": {"factor": _FACTOR},
    "yarn": {
        "factor": _or_null(*_FACTOR),
        **_ORIGINAL,
        **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), _or_null(*_POSITIVE)),
        **dict.fromkeys(("mscale", "mscale_all_dim"), _or_null("a number >= 0", lambda value: is_number(value) and value >= 0)),
        "truncate": _FLAG,
    },
    "llama3": {"factor": _FACTOR, "low_freq_factor": _POSITIVE, "high_freq_factor": _POSITIVE, **_ORIGINAL},
    "longrope": {
        "short_factor": _FACTORS,
        "long_factor": _FACTORS,
        "factor": _or_null(*_FACTOR),
        "attention_factor": _or_null(*_POSITIVE),
        **_ORIGINAL,
    },
    "proportional": {"factor": _FACTOR},
}
"""{rope_type: {field of rope_scaling: (what is expected, a test of it)}}"""

ROPE_DEFAULTS = {
    "yarn": {"attention_factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True},
    "longrope": {"factor": None, "attention_factor": None},
    "proportional": {"factor": 1},
}
"""A field that is in none of them must be given, or (original_max_position_embeddings, null factors) follows from the others."""

REQUIRED_VALUES = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "attention_dropout": (None, 0.0),
    "router_jitter_noise": (None, 0.0),
    "pretraining_tp": (None, 1),
    "output_router_logits": (None, False),
}
"""Fields of a config.json that Config does not have, and the values of them that both models honour."""

OTHER_FIELDS = {
    "architectures", "dtype", "layer_types", "original_max_position_embeddings", "rope_parameters", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
"""Fields that a config.json may have besides, whatever they say."""

PRESETS = {
    "calculator": dict(
        vocab_size=35, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, rope_theta=100.0, tie_word_embeddings=True, initializer_range=0.125, eos_token_id=0,
    ),
    "llama3-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0,
    ),
    "mistral-7b": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
    ),
    "mixtral-8x7b": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen3-8b": dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6, qk_norm=True,
    ),
}  # fmt: skip
"""Mistral is version 0.1, the one with a sliding window."""
