"""Feed-forward layers: SwiGLU, and the mixture of experts with its routers, auxiliary losses and statistics.

Everything that training wants to know of a mixture of experts stands in one place: after a forward pass each MoE layer has a
`routing`, from which `auxiliary_losses(model)` makes the losses to be added to the model's own, `utilisation(model)` what to log,
and `MoE.update_selection_bias` the balance without a loss of DeepSeek-V3:

    loss = model(tokens, labels)
    auxiliary = fp.layers.auxiliary_losses(model)
    (loss + 0.01 * auxiliary["balance"] + 0.001 * auxiliary["z"]).backward()
    optimizer.step()
    for layer in model.modules():
        if isinstance(layer, fp.layers.MoE) and layer.gate.e_score_correction_bias is not None:
            layer.update_selection_bias(0.001)

A layer that a pass leaves out (LayerDrop, early exits) keeps the routing of the pass before, unless its `routing` is set to None.
Under torch.utils.checkpoint that takes use_reentrant=False: the other kind makes its first pass without gradients, so that the losses
would have none, which `auxiliary_losses` refuses.

Nothing here waits for a GPU: counts stay tensors until somebody prints them.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprimer import ops
from fastprimer.backends import outside_autocast, transforming
from fastprimer.config import is_count, is_number
from fastprimer.ops import _arguments as arguments
from fastprimer.ops.routing import best_tokens, check_choice, counts_of, rows_of, sums_of_rows, within_capacity
from fastprimer.ops.swiglu import check_activation
from fastprimer.projections import Projecting


class SwiGLU(Projecting):
    """The dense feed-forward layer: down(silu(gate(x)) * up(x)).

    Args:
        width, inner: C and F.
        activation, limit: of `fp.swiglu`.

    Shapes: x (..., C) -> (..., C).
    """

    def __init__(self, width: int, inner: int, activation: str = "silu", limit: float | None = None):
        super().__init__()
        arguments.check_sizes("SwiGLU", width=width, inner=inner)
        check_activation("SwiGLU", activation, limit)
        self.width, self.activation, self.limit = width, activation, limit
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def projections(self) -> tuple[nn.Module, ...]:
        return self.gate_proj, self.up_proj

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" + ("" if self.limit is None else f", limit={self.limit}")

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        arguments.check_width("SwiGLU: x", x, self.width)
        gate, up = self.project(x)
        return self.down_proj(ops.swiglu(gate, up, activation=self.activation, limit=self.limit))


class Experts(nn.Module):
    """The weights of E SwiGLU layers: gate_up_proj (E, 2F, C), down_proj (E, C, F)."""

    def __init__(self, experts: int, width: int, inner: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def extra_repr(self) -> str:
        E, C, F = self.down_proj.shape
        return f"experts={E}, width={C}, inner={F}"

    def forward(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:  # (N, C), (N, K), (N, K) -> (N, C)
        return ops.moe(tokens, self.gate_up_proj, self.down_proj, weights, experts)


class Router(nn.Module):
    """Logits of E experts, weight (E, C), and where asked for DeepSeek-V3's bias of the choice, (E,) in float32, no parameter.

    Args:
        wide: computes the logits in float32 even for a half-precision model, under autocast too. transformers does so for DeepSeek's
            router, whose sigmoids are compared with a bias, but not for Mixtral's (and there autocast overrules it).
    """

    def __init__(self, width: int, experts: int, selection_bias: bool, wide: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("e_score_correction_bias", torch.empty(experts, dtype=torch.float32) if selection_bias else None)
        self.wide = wide
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, C) -> (N, E)
        dtype = arguments.wide(self.weight.dtype) if self.wide else self.weight.dtype
        linear = outside_autocast(F.linear) if self.wide else F.linear
        return linear(tokens.to(dtype), self.weight.to(dtype))

    def extra_repr(self) -> str:
        E, C = self.weight.shape
        return f"width={C}, experts={E}, selection_bias={self.e_score_correction_bias is not None}, wide={self.wide}"

    def _apply(self, fn, recurse=True):  # model.bfloat16() and the like: steps of 0.001 are lost next to 0.5 in bfloat16
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        bias = self.e_score_correction_bias
        if bias is not None and bias.dtype != torch.float32:
            self.e_score_correction_bias = before.to(bias.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.e_score_correction_bias is not None:  # assign=True takes the stored tensor
            self.e_score_correction_bias = self.e_score_correction_bias.float()


class Routing(NamedTuple):
    """What a router did in one forward pass."""

    logits: Tensor
    """(N, E), with their graph while gradients are recorded."""
    experts: Tensor
    """(N, K); where experts choose, (their tokens, 1)."""
    kept: Tensor | None
    """Like experts: False where the expert was full and the choice dropped. None: nothing can be dropped."""
    even: bool
    """Whether experts chose their tokens, equally many each: there is no balance to be lost."""

    def counts(self) -> Tensor:
        """(E,), int64: how often each expert was chosen, dropped choices included."""
        return counts_of(self.experts, self.logits.shape[1])

    def entropy(self) -> Tensor:
        """Of the counts, as a share of the greatest possible: 1 where all experts are used alike, 0 where one has it all."""
        p = self.counts().float()
        p = p / p.sum().clamp(min=1)
        return torch.special.entr(p).sum() / math.log(max(len(p), 2))

    def dropped(self) -> Tensor:
        """The number of choices that found their expert full."""
        return self.counts().new_zeros(()) if self.kept is None else (~self.kept).sum()


class MoE(nn.Module):
    """A mixture of experts: every token passes through its K best experts, weighted by the router; no token is dropped by default.

    Args:
        width, inner: C and F of every expert.
        experts, per_token: E and K.
        renormalize, score, groups, top_groups, scale: of `fp.route`.
        selection_bias: adds a bias to the choice, moved by `update_selection_bias` (DeepSeek-V3, section 2.1.2).
        shared: F of a SwiGLU that every token passes through besides, 0 for none (DeepSeekMoE, 2024, section 3.2).
        capacity_factor: an expert takes at most capacity_factor N K / E choices, rounded up: first choices before second ones, and
            earlier tokens before later ones. What is beyond contributes nothing (Switch, section 2.2). None: no limit.
        choice: "tokens" choose experts, or "experts" choose the tokens that they give the highest softmax probability, capacity_factor
            (default 1) N K / E each, rounded up (Zhou et al., 2022, section 3.2). It depends on later tokens: not for causal models.
            There score, groups, top_groups, scale and selection_bias stay what they are by default; renormalize has no effect.

    Shapes: x (..., C) -> (..., C). `routing` is what the last forward pass did. Names of parameters as in transformers: gate.weight,
    gate.e_score_correction_bias, experts.gate_up_proj, experts.down_proj, shared_experts.{gate,up,down}_proj.weight.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        experts: int,
        per_token: int,
        renormalize: bool = True,
        *,
        score: str = "softmax",
        groups: int | None = None,
        top_groups: int | None = None,
        scale: float = 1.0,
        selection_bias: bool = False,
        shared: int = 0,
        capacity_factor: float | None = None,
        choice: str = "tokens",
    ):
        super().__init__()
        if choice not in ("tokens", "experts"):
            raise ValueError(f"MoE: choice: expected 'tokens' or 'experts', got {choice!r}")
        if not is_number(scale):
            raise ValueError(f"MoE: scale: expected a number, got {scale!r}")
        arguments.check_sizes("MoE", width=width, inner=inner, experts=experts)
        arguments.check(is_count(shared, 0), "MoE: shared", "an integer >= 0", repr(shared))
        arguments.check_flag("MoE: renormalize", renormalize)
        arguments.check_flag("MoE: selection_bias", selection_bias)
        check_choice("MoE", experts, per_token, score, groups, top_groups, k_name="per_token", E_name="experts")
        usual = score == "softmax" and groups is None and scale == 1 and not selection_bias
        if choice == "experts" and not usual:
            given = f"'experts' with {score=}, {groups=}, {scale=}, {selection_bias=}"
            arguments.refuse("MoE: choice", "'tokens' with another score, groups, scale or selection_bias than by default", given)
        self.gate = Router(width, experts, selection_bias, wide=selection_bias or score == "sigmoid")
        self.experts = Experts(experts, width, inner)
        self.shared_experts = SwiGLU(width, shared) if shared else None
        self.width = width
        self.per_token, self.renormalize, self.choice, self.capacity_factor = per_token, renormalize, choice, capacity_factor
        self.options = {"score": score, "groups": groups, "top_groups": top_groups, "scale": scale}
        self.routing: Routing | None = None

    @property
    def capacity_factor(self) -> float | None:
        """May be set anew, as for evaluation (Switch, section 2.2)."""
        return self._capacity_factor

    @capacity_factor.setter
    def capacity_factor(self, factor: float | None) -> None:
        if factor is not None and not (is_number(factor) and factor > 0):
            raise ValueError(f"MoE: capacity_factor: expected a number > 0 or None, got {factor!r}")
        self._capacity_factor = factor
        # As it was written, in integers: in binary 1.1 · 100 / 10 is more than 11, and torch.compile would make the number a symbol.
        self._capacity_ratio = Fraction(str(1 if factor is None else factor)).as_integer_ratio()

    @classmethod
    def switch(cls, width: int, inner: int, experts: int, capacity_factor: float | None = 1.25) -> MoE:
        """Switch Transformer: one expert a token, weighted by its probability; the fuller experts drop tokens."""
        return cls(width, inner, experts, 1, renormalize=False, capacity_factor=capacity_factor)

    @classmethod
    def mixtral(cls, width: int, inner: int, experts: int = 8, per_token: int = 2) -> MoE:
        """Mixtral: the two best of eight, their weights summing to one, none dropped."""
        return cls(width, inner, experts, per_token)

    @classmethod
    def deepseek(
        cls, width: int, inner: int, experts: int, per_token: int, shared: int = 1, groups: int = 8, top_groups: int = 4, scale: float = 2.5
    ) -> MoE:
        """DeepSeekMoE as in DeepSeek-V3: many small experts by sigmoid from the best groups, `shared` more for all, balanced by a bias."""
        options = {"groups": groups, "top_groups": top_groups, "scale": scale, "selection_bias": True, "shared": shared * inner}
        return cls(width, inner, experts, per_token, score="sigmoid", **options)

    def forward(self, x: Tensor) -> Tensor:
        arguments.check_width("MoE: x", x, self.width)
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.gate(tokens)
        y = self._experts_choose(tokens, logits) if self.choice == "experts" else self._tokens_choose(tokens, logits)
        y = y.view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    def _tokens_choose(self, tokens: Tensor, logits: Tensor) -> Tensor:
        bias = self.gate.e_score_correction_bias
        weights, experts = ops.route(logits, self.per_token, renormalize=self.renormalize, bias=bias, **self.options)
        kept = None
        if self.capacity_factor is not None:
            kept = within_capacity(experts, logits.shape[1], self._capacity(tokens.shape[0]))
            weights = weights * kept
        self.routing = Routing(logits, experts, kept, even=False)
        return self.experts(tokens, weights, experts)

    def _experts_choose(self, tokens: Tensor, logits: Tensor) -> Tensor:
        weights, chosen = best_tokens(logits, min(self._capacity(tokens.shape[0]), tokens.shape[0]))  # (E, capacity)
        experts = torch.arange(chosen.shape[0], device=chosen.device).repeat_interleave(chosen.shape[1]).unsqueeze(1)
        self.routing = Routing(logits, experts, None, even=True)
        chosen, weights = chosen.flatten(), weights.reshape(-1, 1)
        y = self.experts(rows_of(tokens, chosen), weights, experts)
        return sums_of_rows(y, chosen, tokens.shape[0])

    def _capacity(self, N: int) -> int:
        numerator, denominator = self._capacity_ratio
        return -(-numerator * N * self.per_token // (denominator * len(self.gate.weight)))

    @torch.no_grad()
    def update_selection_bias(self, rate: float = 0.001, counts: Tensor | None = None) -> None:
        """Make experts that were chosen less than the mean more attractive by `rate`, others less (DeepSeek-V3, section 2.1.2).

        Args:
            rate: the step by which each expert's bias moves.
            counts: (E,), how often each expert was chosen since the last update; by default in the last forward pass. With several
                processes, or gradients that are accumulated, their sum.

        Raises:
            TypeError, ValueError: the layer has no selection bias, there is nothing to count yet, or an argument does not fit.
        """
        bias, name = self.gate.e_score_correction_bias, "MoE: update_selection_bias"
        if bias is None:
            raise ValueError(f"{name}: expected a layer with selection_bias=True")
        if not is_number(rate):
            raise ValueError(f"{name}: rate: expected a number, got {rate!r}")
        if counts is None:
            if self.routing is None:
                raise ValueError(f"{name}: expected counts, for there was no forward pass yet")
            counts = self.routing.counts()
        if not isinstance(counts, Tensor):
            raise TypeError(f"{name}: counts: expected a tensor, got {type(counts).__name__}")
        arguments.check_shape(f"{name}: counts", counts, tuple(bias.shape), "(E,)")
        counts = counts.to(bias)
        bias += rate * torch.sign(counts.mean() - counts)

    def extra_repr(self) -> str:
        shown = {"per_token": self.per_token, "renormalize": self.renormalize, **self.options}
        shown |= {"choice": self.choice, "capacity_factor": self.capacity_factor}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "routing": None}  # its graph can be neither copied nor pickled


def _of_vmap(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _routed(model: nn.Module) -> dict[str, MoE]:
    """The layers that have a routing, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE) and module.routing is not None}
    for name, layer in layers.items():
        if not torch.compiler.is_compiling() and not transforming() and _of_vmap(layer.routing.logits):
            raise RuntimeError(
                f"model: expected a routing of plain tensors, got that of {name or 'a layer'!r} from within torch.func.vmap, whose tensors "
                "ended with it: call this within the transform too, or after another forward pass"
            )
    return layers


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """The routers' losses of a model's last forward pass, each summed over its MoE layers, in float32 (float64 for
    float64); empty for a dense model.

    transformers pools the tokens of all layers where this sums the layers' losses: divided by the number of MoE layers, "balance" is
    on the scale of its `router_aux_loss_coef` (which it applies to all tokens, while a model that is given labels leaves out the last).

    Returns:
        {"balance": `fp.load_balancing_loss`, "z": `fp.router_z_loss`}. Add them to the loss with coefficients of your own: the papers
        take 0.01 (Switch) for the first and 0.001 (ST-MoE) for the second.

    Raises:
        RuntimeError: gradients are recorded, and a layer in training has made its logits without them, as within
            torch.utils.checkpoint(..., use_reentrant=True): the losses would train nothing.
    """
    layers = _routed(model)
    if not layers:
        return {}
    for name, layer in layers.items():
        trains = torch.is_grad_enabled() and layer.training and layer.gate.weight.requires_grad
        if trains and not layer.routing.logits.requires_grad:
            raise RuntimeError(
                f"auxiliary_losses: model: expected logits with a graph, got those of {name or 'a layer'!r} without: its last forward pass "
                "recorded no gradients; call torch.utils.checkpoint with use_reentrant=False, or auxiliary_losses under torch.no_grad()"
            )
    routings = [layer.routing for layer in layers.values()]
    z = sum(ops.router_z_loss(r.logits) for r in routings)
    return {
        "balance": sum((ops.load_balancing_loss(r.logits, r.experts) for r in routings if not r.even), torch.zeros_like(z)),
        "z": z,
    }


def utilisation(model: nn.Module) -> dict[str, dict]:
    """How a model's experts were used in its last forward pass, for logs: this is where a GPU is waited for.

    Returns:
        {layer's name: {"counts": choices of each expert, "entropy": 1 where all are used alike .. 0, "dropped": choices beyond capacity}}.
    """
    routings = {name: layer.routing for name, layer in _routed(model).items()}
    return {
        name: {"counts": r.counts().tolist(), "entropy": float(r.entropy()), "dropped": int(r.dropped())} for name, r in routings.items()
    }
