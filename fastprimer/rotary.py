r"""The cosine and sine tables of fp.rope: which angle each pair of features turns by at each position.

Pair i of R rotary features turns by f_i m at position m, with f_i = θ^(−2i/R) (Su et al., "RoFormer" (2021), section 3.2.2).
A model that has been trained on L positions is extended to longer sequences by other frequencies f', here with the factor s
(settings in `code`, by their names in a Hugging Face config.json; the types and defaults are those of transformers):

| rope_type      | f'_i                                                                              | source |
| -------------- | --------------------------------------------------------------------------------- | ------ |
| "default"      | f_i                                                                               | Su et al. (2021) |
| "linear"       | f_i / s, as if all positions were divided by s                                    | Chen et al. (2023) |
| "dynamic"      | (θ u)^(−2i/R),  u = (s T/L − s + 1)^(R/(R−2)),  T = max(L, length)                 | bloc97, emozilla (2023) |
| "yarn"         | f_i (γ_i + (1 − γ_i) / s),  γ_i = 1 − clamp((i − a) / (b − a), 0, 1)                | Peng et al. (2023) |
| "llama3"       | f_i (γ_i + (1 − γ_i) / s),  γ_i = clamp((L f_i / 2π − low) / (high − low), 0, 1)    | Llama 3.1 (2024) |
| "longrope"     | f_i / λ_i,  λ = `short_factor`, in sequences longer than L `long_factor`            | Ding et al. (2024) |
| "proportional" | θ^(−2i/D) / s for the first n pairs, else 0                                        | Barbero et al. (2024) |

- linear: Chen et al., "Extending Context Window of LLMs via Positional Interpolation" (2023), section 2.3.
- dynamic: bloc97's "NTK-aware scaled RoPE" (2023) scales θ by s^(R/(R−2)): f_0 stays, and the slowest pair, i = R/2 − 1, is
  interpolated by s exactly. emozilla's dynamic form lets the scale grow with the sequence; L is `max_position_embeddings`.
  Both are written up in Peng et al., sections 3.1 and 3.3.
- yarn: Peng et al., "YaRN: Efficient Context Window Extension of LLMs" (2023), sections 3.2 and 3.4. Pair i makes L f_i / 2π
  turns on the L = `original_max_position_embeddings` positions; r turns are made at i(r) = R ln(L / 2πr) / (2 ln θ). With
  a = i(`beta_fast`) and b = i(`beta_slow`), rounded outwards if `truncate`, faster pairs stay and slower ones are interpolated.
  Scores are sharpened: cos and sin are multiplied by `attention_factor`, by default 1 + 0.1 ln s, or with `mscale` (c) and
  `mscale_all_dim` (d) by (1 + 0.1 c ln s) / (1 + 0.1 d ln s).
- llama3: Grattafiori et al., "The Llama 3 Herd of Models" (2024); the ramp between `low_freq_factor` and `high_freq_factor`
  turns on L = `original_max_position_embeddings` positions is that of Meta's published code.
- longrope: Ding et al., "LongRoPE" (2024), with L = `original_max_position_embeddings` and the attention factor of Phi-3,
  √(1 + ln s / ln L).
- proportional: Barbero et al., "Round and Round We Go!" (2024), p-RoPE. n = ⌊D `partial_rotary_factor` / 2⌋. The pairs are
  (i, i + D/2) of the whole head, so the resting ones cannot be left out of the tables: their angle is 0.

For all others R = ⌊D `partial_rotary_factor`⌋: the features R..D−1 of a head are not rotated (GPT-NeoX, Black et al. (2022)).

**The length of "dynamic" and "longrope"** is that of the sequence. A single forward pass takes its greatest position + 1, as
transformers does; nothing is remembered from call to call. But a sequence that grows in a cache cannot change its frequencies:
the cached keys are rotated already, and the values and keys of deeper layers were computed from scores under the old ones, so
that no later rotation makes them those of one forward pass (the cache of unrotated keys that Peng et al., section 3.3, propose
is right in the first layer only). Hence with a cache the length is the cache's room from the first token on. All tokens are
computed under one set of frequencies, and decoding gives what one forward pass with `longest` = the room gives. The price: ask
for no more room than needed, for beyond L it changes the model. (transformers changes the frequencies as the cache grows, and
attends to keys of differing ones.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastprimer.config import Config, Rope


class RotaryEmbedding(nn.Module):
    """The cosine and sine tables of fp.rope; it has no state, so that no .to(dtype) can round its frequencies.

    Args:
        head_dim: D.
        theta: the base of the frequencies.
        scaling: `rope_scaling` of a Hugging Face config, or `rope_parameters`, whose rope_theta and partial_rotary_factor count.
        partial_rotary_factor: the share of a head's features that are rotated.
        max_position_embeddings: of the same config; "dynamic" scales beyond it, others take it for a missing original length.

    Raises:
        fastprimer.config.ConfigError: a field is unknown, missing or wrong; the message names it.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        scaling: dict | None = None,
        *,
        partial_rotary_factor: float = 1.0,
        max_position_embeddings: int = 2048,
    ):
        super().__init__()
        self.rope = Rope.read(scaling, head_dim, theta, partial_rotary_factor, max_position_embeddings)
        self.head_dim = head_dim
        self.theta = self.rope.theta
        self.attention_factor = attention_factor(self.rope)

    @classmethod
    def from_config(cls, config: Config) -> RotaryEmbedding:
        return cls(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            partial_rotary_factor=config.partial_rotary_factor,
            max_position_embeddings=config.max_position_embeddings,
        )

    @property
    def adaptive(self) -> bool:
        """Whether the tables depend on the length of the sequence: "dynamic" and "longrope"."""
        return self.rope.adaptive

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32, longest: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """positions (P,) -> cos, sin (P, R/2), float32 at least.

        Adaptive tables are those for a sequence of `longest` positions, by default the greatest of these + 1. Positions that differ from
        row to row, (B, S), are `fp.rope`'s: as rows of tables of all positions.
        """
        if not isinstance(positions, Tensor):
            raise TypeError(f"RotaryEmbedding: positions: expected a tensor, got {type(positions).__name__}")
        if positions.dim() != 1:
            raise ValueError(f"RotaryEmbedding: positions: expected shape (P,), got {tuple(positions.shape)}")
        dtype = torch.promote_types(dtype, torch.float32)
        if longest is None:
            longest = positions.max() + 1 if self.adaptive and positions.numel() else 0
        angles = positions.to(dtype)[:, None] * frequencies(self.rope, longest, positions.device).to(dtype)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta:g}, rope_type={self.rope.kind!r}"


def frequencies(rope: Rope, longest: int | Tensor, device: torch.device | None = None) -> Tensor:
    """f' (R/2,) in float64, for a sequence of `longest` positions; a tensor on a GPU is not waited for."""
    R, settings = rope.rotary_size, rope.settings
    pairs = torch.arange(R // 2, device=device, dtype=torch.float64)
    f = rope.theta ** (-2 * pairs / R)
    if rope.kind == "linear":
        return f / settings["factor"]
    if rope.kind == "proportional":
        return torch.where(pairs < rope.turning_pairs, f / settings["factor"], 0.0)
    if rope.kind == "dynamic":
        stretch = (longest * pairs.new_ones(()) / rope.max_position_embeddings).clamp(min=1)
        growth = settings["factor"] * stretch - (settings["factor"] - 1)
        return f * growth ** (-2 * pairs / (R - 2))
    if rope.kind == "longrope":
        short, long = (f.new_tensor(settings[field]) for field in ("short_factor", "long_factor"))
        beyond = longest * pairs.new_ones(()) > settings["original_max_position_embeddings"]
        return f / torch.where(beyond, long, short)
    if rope.kind in ("yarn", "llama3"):
        kept = _yarn_kept(rope, pairs) if rope.kind == "yarn" else _llama3_kept(settings, f)
        return f * (kept + (1 - kept) / settings["factor"])
    return f


def _yarn_kept(rope: Rope, pairs: Tensor) -> Tensor:
    """γ of YaRN: 1 for the pairs before a, 0 for those after b."""
    R, settings = rope.rotary_size, rope.settings

    def pair_of(turns: float) -> float:
        return R * math.log(settings["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    a, b = pair_of(settings["beta_fast"]), pair_of(settings["beta_slow"])
    if settings["truncate"]:
        a, b = math.floor(a), math.ceil(b)
    a, b = max(a, 0), min(b, R - 1)
    if a == b:
        b += 0.001  # as transformers does; no division by zero
    return 1 - ((pairs - a) / (b - a)).clamp(0, 1)


def _llama3_kept(settings: dict, f: Tensor) -> Tensor:
    """γ of Llama 3.1: 1 for the pairs that make at least `high` turns on the original positions, 0 up to `low`."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * f / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by, so that scores are multiplied by its square (partly rotated heads: in part)."""
    settings, given = rope.settings, rope.settings.get("attention_factor")
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if given is not None:
        return float(given)
    log_factor = math.log(max(settings["factor"], 1))
    if rope.kind == "longrope":
        return math.sqrt(1 + log_factor / math.log(settings["original_max_position_embeddings"]))
    over, under = settings["mscale"], settings["mscale_all_dim"]
    if not over or not under:
        over, under = 1.0, 0.0
    return (1 + 0.1 * over * log_factor) / (1 + 0.1 * under * log_factor)
