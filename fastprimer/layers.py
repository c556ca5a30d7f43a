"""Drop-in layers, thin over the operations; parameter names as in Hugging Face's LLaMA, Qwen3 and Mixtral."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprimer import ops
from fastprimer.config import HIDDEN_ACTS, Config, is_number
from fastprimer.decoding import LayerCache as LayerCache
from fastprimer.feed_forward import MoE as MoE
from fastprimer.feed_forward import Routing as Routing
from fastprimer.feed_forward import SwiGLU as SwiGLU
from fastprimer.feed_forward import auxiliary_losses as auxiliary_losses
from fastprimer.feed_forward import utilisation as utilisation
from fastprimer.losses import LinearCrossEntropy as LinearCrossEntropy
from fastprimer.ops import _arguments as arguments
from fastprimer.projections import Projecting
from fastprimer.projections import pack_projections as pack_projections
from fastprimer.rotary import RotaryEmbedding as RotaryEmbedding


class RMSNorm(nn.Module):
    """fp.rms_norm with a learned weight. With a residual: (norm(x + residual), x + residual).

    Args:
        width: C. eps: added to the mean square.
        weight_offset: what is added to the weight (1.0 for Gemma's, whose weights begin at 0).
        device, dtype: of the weight.

    Shapes: x (..., C), residual likewise or None -> (..., C), or two of them.

    Raises:
        TypeError, ValueError: width, eps or weight_offset is no such number, and as by `fp.rms_norm`; the message names it.
    """

    def __init__(self, width: int, eps: float = 1e-6, *, weight_offset: float = 0.0, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        arguments.check_sizes("RMSNorm", width=width)
        arguments.check(is_number(eps) and eps >= 0, "RMSNorm: eps", "a finite number >= 0", repr(eps))
        arguments.check(is_number(weight_offset), "RMSNorm: weight_offset", "a finite number", repr(weight_offset))
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.eps, self.weight_offset = eps, weight_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A factor of one in every column."""
        nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.weight.numel()}, eps={self.eps}{offset}"

    def forward(self, x: Tensor, residual: Tensor | None = None):
        if residual is not None:
            x = x.to(residual.dtype)  # under autocast x is the half-precision output of a linear layer
        return ops.rms_norm(x, self.weight, self.eps, residual=residual, weight_offset=self.weight_offset)


class Attention(Projecting):
    """Causal self-attention in which H/Hk query heads share one key/value head: projections, RoPE, fp.attention, projection.

    Args:
        config: its sizes, qk_norm and sliding_window.
    """

    def __init__(self, config: Config):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.window = None if config.sliding_window is None else (config.sliding_window - 1, 0)

    def projections(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """x (B, S, C), and for fp.rope cos, sin (P, R/2) and the rows of them (B, S), by default 0..S-1 -> (B, S, C)."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.project(x))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rope(q, k, cos, sin, positions=positions)
        if cache is None:
            output = ops.attention(q, k, v, causal=True, window=self.window)
        else:
            output = cache.attend(q, k, v, self.window)
        return self.o_proj(output.flatten(2))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual; the sum is formed by the norm that follows it.

    Args:
        config: its sizes, and whether the feed-forward layer is SwiGLU or a mixture of experts.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sizes = config.hidden_size, config.intermediate_size
        if config.is_moe:
            self.mlp = MoE(*sizes, config.num_local_experts, config.num_experts_per_tok, config.norm_topk_prob)
        else:
            self.mlp = SwiGLU(*sizes, HIDDEN_ACTS[config.hidden_act])

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, S, C), the output of the layer before, yet to be added to residual (None: nothing) -> the same pair."""
        if residual is None:
            y, residual = self.input_layernorm(x), x
        else:
            y, residual = self.input_layernorm(x, residual)
        x = self.self_attn(y, cos, sin, positions, cache)
        y, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(y), residual
