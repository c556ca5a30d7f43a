"""The shape of a decoder, under the field names of a Hugging Face config.json.

Every field is honoured by both models. A config.json that asks for something else (another activation, biases, scaled rotary
embeddings ...) is refused by name: a model that silently ignores a setting computes something else than its author meant.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field."""


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None  # a query sees itself and the sliding_window - 1 keys before it
    qk_norm: bool = False  # RMSNorm on every head of q and k (Qwen3)
    tie_word_embeddings: bool = False
    num_local_experts: int = 0  # 0: a dense feed-forward layer
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True  # the weights of a token's chosen experts sum to one
    initializer_range: float = 0.02

    def __post_init__(self):
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
        self._check_count("head_dim", 2)
        self._check(self.head_dim % 2 == 0, "head_dim", "an even number")
        divides = self.num_attention_heads % self.num_key_value_heads == 0
        self._check(divides, "num_key_value_heads", f"a divisor of num_attention_heads = {self.num_attention_heads}")
        if self.sliding_window is not None:
            self._check_count("sliding_window", 1)
        if self.num_local_experts:
            fits = self.num_experts_per_tok <= self.num_local_experts
            self._check(fits, "num_experts_per_tok", f"at most num_local_experts = {self.num_local_experts}")
        for field in ("qk_norm", "tie_word_embeddings", "norm_topk_prob"):
            self._check(isinstance(getattr(self, field), bool), field, "true or false")
        for field in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, field)
            self._check(isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0, field, "a number >= 0")
        self._check(self.rope_theta > 0, "rope_theta", "a number > 0")
        self._check_rope_scaling()

    def _check(self, condition: bool, field: str, expected: str) -> None:
        if not condition:
            raise ConfigError(f"config: {field}: expected {expected}, got {getattr(self, field)!r}")

    def _check_count(self, field: str, least: int) -> None:
        value = getattr(self, field)
        self._check(isinstance(value, int) and not isinstance(value, bool) and value >= least, field, f"an integer >= {least}")

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        self._check(isinstance(self.rope_scaling, dict), "rope_scaling", "an object or null")
        kind = self.rope_scaling.get("rope_type", self.rope_scaling.get("type", "default"))
        self._check(kind == "default", "rope_scaling", "the type 'default' (scaled rotary embeddings are not supported yet)")

    @property
    def is_moe(self) -> bool:
        return self.num_local_experts > 0

    @property
    def model_type(self) -> str:
        """The Hugging Face architecture that computes the same, or "fastprimer" where there is none."""
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
        """Take the fields of a Hugging Face config.json; refuse those that ask for what is not supported."""
        given = dict(given)
        kind = given.get("model_type", "llama")
        if kind not in MODEL_TYPES:
            raise ConfigError(f"config: model_type: expected one of {', '.join(MODEL_TYPES)}, got {kind!r}")
        rope = given.get("rope_parameters")  # transformers 5 keeps all of it in one object
        if isinstance(rope, dict):
            for field in ("rope_theta", "partial_rotary_factor"):
                if field in rope:
                    given.setdefault(field, rope[field])
            given["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        if kind == "qwen3":
            given |= {"qk_norm": True, "sliding_window": None}
        layer = "full_attention" if given.get("sliding_window") is None else "sliding_attention"
        for field, supported in {**REQUIRED_VALUES, "layer_types": (None, [layer] * given.get("num_hidden_layers", 0))}.items():
            if given.get(field, supported[0]) not in supported:
                raise ConfigError(f"config: {field}: only {supported[-1]!r} is supported, got {given[field]!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in given]
        if missing:
            raise ConfigError(f"config: {missing[0]}: expected a value, got none")
        return cls(**{name: value for name, value in given.items() if name in names})

    def to_dict(self) -> dict:
        """The fields as a Hugging Face config.json of the same model."""
        architecture = self.model_type.capitalize()
        fields = dataclasses.asdict(self)
        if not self.is_moe:
            fields = {k: v for k, v in fields.items() if k not in ("num_local_experts", "num_experts_per_tok", "norm_topk_prob")}
        return {"architectures": [f"{architecture}ForCausalLM"], "model_type": self.model_type, "hidden_act": "silu", **fields}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen3", "fastprimer")

REQUIRED_VALUES = {
    "hidden_act": ("swish", "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "attention_dropout": (None, 0.0),
    "router_jitter_noise": (None, 0.0),
    "pretraining_tp": (None, 1),
}
"""Fields of a config.json that Config does not have, and the values of them that both models honour."""

PRESETS = {
    "calculator": dict(
        vocab_size=35, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, rope_theta=100.0, tie_word_embeddings=True, initializer_range=0.125,
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
