"""The whole decoder, dense or mixture of experts, in plain torch: the independent oracle, and the model in one sitting.

Nothing here comes from fastprimer.ops. What it computes is what fastprimer.Model must compute; parameter names are those of
Hugging Face's LLaMA, Qwen3 (q_norm, k_norm) and Mixtral, so that weights pass between all of them.

Letters: B batch, S sequence, H query heads, Hk key/value heads, D head size, R rotary size, C width, F feed-forward width,
E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprimer.config import Config, Rope


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = (wide * wide).mean(dim=-1, keepdim=True)
        return (wide / torch.sqrt(mean_square + self.eps) * self.weight).to(x.dtype)


def frequency(rope: Rope, pair: int, length: int) -> float:
    """The angle per position of one pair of features in a sequence of this length; sources: see fastprimer/rotary.py."""
    size, own = rope.rotary_size, rope.settings
    plain = 1 / math.pow(rope.theta, 2 * pair / size)
    if rope.kind == "linear":
        return plain / own["factor"]
    if rope.kind == "proportional":
        return plain / own["factor"] if pair < int(size * rope.partial_rotary_factor // 2) else 0.0
    if rope.kind == "dynamic":
        beyond = max(0, length - rope.max_position_embeddings) / rope.max_position_embeddings
        theta = rope.theta * math.pow(1 + own["factor"] * beyond, size / (size - 2))
        return 1 / math.pow(theta, 2 * pair / size)
    if rope.kind == "longrope":
        return plain / own["long_factor" if length > own["original_max_position_embeddings"] else "short_factor"][pair]
    if rope.kind == "llama3":
        wavelength, original = 2 * math.pi / plain, own["original_max_position_embeddings"]
        if wavelength < original / own["high_freq_factor"]:
            return plain
        if wavelength > original / own["low_freq_factor"]:
            return plain / own["factor"]
        smooth = (original / wavelength - own["low_freq_factor"]) / (own["high_freq_factor"] - own["low_freq_factor"])
        return (1 - smooth) * plain / own["factor"] + smooth * plain
    if rope.kind == "yarn":
        weight = yarn_interpolation(rope, pair)
        return weight * plain / own["factor"] + (1 - weight) * plain
    return plain


def yarn_interpolation(rope: Rope, pair: int) -> float:
    """How much of pair's frequency is interpolated: 0 up to the last pair that turns often, 1 from the first that turns seldom."""
    own = rope.settings
    often, seldom = (
        rope.rotary_size / 2 * math.log(own["original_max_position_embeddings"] / (2 * math.pi * own[turns]), rope.theta)
        for turns in ("beta_fast", "beta_slow")
    )
    if own["truncate"]:
        often, seldom = math.floor(often), math.ceil(seldom)
    often, seldom = max(often, 0), min(seldom, rope.rotary_size - 1)
    width = seldom - often or 0.001
    return min(1.0, max(0.0, (pair - often) / width))


def rotary_scale(rope: Rope) -> float:
    """YaRN and LongRoPE lengthen queries and keys, which sharpens attention in long sequences."""
    own = rope.settings
    if own.get("attention_factor") is not None:
        return own["attention_factor"]
    if rope.kind == "longrope" and own["factor"] > 1:
        return math.sqrt(1 + math.log(own["factor"], own["original_max_position_embeddings"]))
    if rope.kind == "yarn" and own["factor"] > 1:
        tenth = math.log(own["factor"]) / 10
        if own["mscale"] and own["mscale_all_dim"]:
            return (own["mscale"] * tenth + 1) / (own["mscale_all_dim"] * tenth + 1)
        return tenth + 1
    return 1.0


def rotary_angles(config: Config, positions: Tensor, dtype: torch.dtype, longest: int | None = None) -> Tensor:
    """positions (B, S) -> angles (B, S, R/2); longest, the number of positions in use, is by default the greatest + 1."""
    rope = config.rope
    if longest is None:
        longest = int(positions.max()) + 1 if rope.adaptive and positions.numel() else 0  # the others do not ask for it
    frequencies = [frequency(rope, pair, longest) for pair in range(rope.rotary_size // 2)]
    return positions[..., None].to(dtype) * torch.tensor(frequencies, dtype=dtype, device=positions.device)


def rotate(x: Tensor, angles: Tensor, scale: float) -> Tensor:
    """x (B, S, H, D): the pair (x_i, x_{i + R/2}) is a point in the plane, turned by angles (B, S, R/2), and scaled."""
    cos, sin = scale * angles.cos()[:, :, None], scale * angles.sin()[:, :, None]  # (B, S, 1, R/2): all heads alike
    half = angles.shape[-1]
    first, second, rest = x.to(angles.dtype).split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which H/Hk query heads share one key/value head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:  # x (B, S, C), angles (B, S, R/2) -> (B, S, C)
        batch, length, _ = x.shape
        q = self.q_proj(x).unflatten(-1, (-1, self.config.head_dim))  # (B, S, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.config.head_dim))  # (B, S, Hk, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.config.head_dim))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        scale = rotary_scale(self.config.rope)
        q, k = rotate(q, angles, scale), rotate(k, angles, scale)
        shared_by = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(shared_by, dim=2), v.repeat_interleave(shared_by, dim=2)  # (B, S, H, D)

        scores = torch.einsum("bshd,bthd->bhst", q, k) / self.config.head_dim**0.5
        scores = scores.masked_fill(~self.visible(length, x.device), float("-inf"))
        weights = scores.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1).to(x.dtype)
        output = torch.einsum("bhst,bthd->bshd", weights, v)
        return self.o_proj(output.flatten(-2))

    def visible(self, length: int, device: torch.device) -> Tensor:
        """(S, S): query i sees key j <= i, at most sliding_window of them."""
        distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        window = self.config.sliding_window or length
        return (distance >= 0) & (distance < window)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), or GEGLU with the tanh form of gelu in place of silu."""

    def __init__(self, config: Config):
        super().__init__()
        self.gelu = config.hidden_act == "gelu_pytorch_tanh"
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, C) -> (B, S, C)
        gate = self.gate_proj(x)
        return self.down_proj((F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)) * self.up_proj(x))


class Experts(nn.Module):
    """The weights of E SwiGLU layers."""

    def __init__(self, config: Config):
        super().__init__()
        experts, width, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x: Tensor, expert: int) -> Tensor:  # (n, C) -> (n, C)
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[expert])


class MoE(nn.Module):
    """Every token passes through its K most probable experts, weighted by their probabilities."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config)
        self.routed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:  # (B, S, C) -> (B, S, C)
        tokens = x.flatten(0, 1)  # (N, C)
        logits = self.gate(tokens)
        probabilities = logits.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1)  # (N, E)
        weights, chosen = probabilities.topk(self.config.num_experts_per_tok, dim=-1)  # (N, K)
        self.routed = logits, chosen
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        output = torch.zeros_like(tokens)
        for expert in range(self.config.num_local_experts):
            token, rank = (chosen == expert).nonzero(as_tuple=True)
            share = weights[token, rank, None].to(x.dtype)
            output = output.index_add(0, token, share * self.experts(tokens[token], expert))
        return output.view_as(x)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "routed": None}  # its graph can be neither copied nor pickled


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """Of the last forward pass, summed over layers; empty for a dense model: Switch's E sum_e f_e P_e, where f_e is the share of tokens
    that chose expert e and P_e its mean probability, and ST-MoE's mean of the squared logsumexp of a token's logits."""
    losses: dict[str, list[Tensor]] = {}
    for layer in model.modules():
        if isinstance(layer, MoE) and layer.routed is not None:
            logits, chosen = layer.routed
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            share = F.one_hot(chosen, logits.shape[-1]).sum(dim=1).to(wide.dtype).mean(dim=0)
            losses.setdefault("balance", []).append(logits.shape[-1] * (share * wide.softmax(dim=-1).mean(dim=0)).sum())
            losses.setdefault("z", []).append((wide.logsumexp(dim=-1) ** 2).mean())
    return {name: torch.stack(found).sum() for name, found in losses.items()}


class DecoderLayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe else MLP(config)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor | None, longest: int | None) -> Tensor:  # (B, S) -> (B, S, C)
        x = self.embed_tokens(tokens)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        angles = rotary_angles(self.config, positions, torch.promote_types(x.dtype, torch.float32), longest)
        for layer in self.layers:
            x = layer(x, angles)
        return self.norm(x)


class Model(nn.Module):
    """A decoder with a language-model head, which is the embedding itself where the config ties them."""

    def __init__(self, config: Config):
        super().__init__()
        check_config(config)
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self, config.initializer_range)

    def logits(self, x: Tensor) -> Tensor:  # (B, S, C) -> (B, S, V)
        return F.linear(x, self.model.embed_tokens.weight) if self.config.tie_word_embeddings else self.lm_head(x)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, positions: Tensor | None = None, longest: int | None = None) -> Tensor:
        """tokens (B, S) -> logits (B, S, V), or with labels (B, S) the mean loss of predicting each from the tokens before it.

        A label of -100 is not counted. Frequencies that depend on the length are those for `longest` positions, by default those in
        the call.
        """
        if labels is None:
            return self.logits(self.model(tokens, positions, longest))
        if longest is None and self.config.rope.adaptive and tokens.numel():
            longest = tokens.shape[1] if positions is None else int(positions.max()) + 1
        tokens, positions = tokens[:, :-1], None if positions is None else positions[:, :-1]  # the last has no successor
        logits = self.logits(self.model(tokens, positions, longest))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten().long())


def check_config(config: object) -> None:
    if not isinstance(config, Config):
        raise TypeError(f"Model: config: expected a Config, as Config.preset or Config.from_dict make, got {type(config).__name__}")


def initialize(model: nn.Module, deviation: float) -> None:
    """Matrices normal, norms one; drawn in the order of the parameters, which all models with these names share."""
    for parameter in model.parameters():
        if parameter.is_meta:
            continue
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=deviation)
