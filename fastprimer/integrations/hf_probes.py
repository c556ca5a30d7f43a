"""What a layer of transformers computes, found by trying: its own forward, with small random weights in float32 on the CPU, beside ours.

Each function returns the options with which ours is the same, or raises Unlike with the reason why no options are.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastprimer import ops
from fastprimer.backends import use_backend

B, S, H, D = 2, 5, 3, 16
C, F, E, K = 16, 24, 4, 2
V = 7


class Unlike(Exception):
    """Why a layer cannot be replaced."""


@contextlib.contextmanager
def trying():
    """Reproducible, without a trace in the random numbers, whatever the device, dtype and autocast around it are; a failure is Unlike."""
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.no_grad(),
            use_backend("reference"),
        ):
            torch.manual_seed(0)
            yield
    except Unlike:
        raise
    except Exception as error:
        raise Unlike(f"it cannot be tried alone ({type(error).__name__}: {error})") from None


def stub(module: nn.Module, **parts) -> nn.Module:
    """A layer of this class with the same plain attributes, and these parts in place of its parameters and layers; in training mode, so
    that a dropout shows."""
    like = type(module).__new__(type(module))
    nn.Module.__init__(like)
    for name, value in vars(module).items():
        if not name.startswith("_"):
            setattr(like, name, value)
    for name, part in parts.items():
        setattr(like, name, part)
    return like.train()


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def without_hooks(module: nn.Module) -> nn.Module:
    """A copy that shares everything else: nobody's hook is to see what a layer is tried with."""
    twin = copy.copy(module)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(twin, name, type(getattr(module, name))())
    return twin


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


def linear(inner: int, outer: int) -> nn.Linear:
    return nn.Linear(inner, outer, dtype=torch.float32)


def same(got, expected) -> bool:
    """Equal but for rounding: other formulas differ by far more."""
    if not isinstance(expected, Tensor) or got.shape != expected.shape:
        return False
    return torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


SCALES = (1.0, 30.0, 1e4)
"""Of the numbers that a gated layer is tried with: a clamp shows only beyond it."""


def takes(module: nn.Module, arguments: int) -> None:
    parameters = inspect.signature(type(module).forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(named) != 1 + arguments or len(named) != len(parameters):
        raise Unlike(f"its forward takes other arguments: {', '.join(map(str, parameters))}")


def rms_norm(module: nn.Module) -> dict:
    """eps and weight_offset of x / sqrt(mean(x^2) + eps) (weight + weight_offset), or eps alone for one without a weight."""
    takes(module, 1)
    eps = next((getattr(module, name, None) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(eps, float):
        raise Unlike("it has no number variance_epsilon or eps")
    weighted = isinstance(getattr(module, "weight", None), nn.Parameter)
    with trying():
        weight = random(D) if weighted else None
        x = random(B, S, D) * torch.logspace(-4, 1, S).unsqueeze(1)  # small ones show eps
        expected = stub(module, **({"weight": nn.Parameter(weight)} if weighted else {}))(x)
        for offset in (0.0, 1.0):
            if same(ops.rms_norm(x, weight, eps, weight_offset=offset), expected):
                return {"eps": eps, "weight_offset": offset, "weighted": weighted}
    raise Unlike("it computes something else than x / sqrt(mean(x^2) + eps) weight")


def swiglu(module: nn.Module) -> dict:
    """The activation, whether gate and up are one projection, and the layer's own activation, by name and class."""
    takes(module, 1)
    idle = {name for name, child in module.named_children() if isinstance(child, nn.Dropout) and child.p == 0}
    children = set(dict(module.named_children())) - {"act_fn", "activation_fn", "act"} - idle
    packed = children == {"gate_up_proj", "down_proj"}
    if not packed and children != {"gate_proj", "up_proj", "down_proj"}:
        raise Unlike(f"it is not of gate_proj, up_proj and down_proj, but of {', '.join(sorted(children))}")
    with trying():
        activations = {name: without_hooks(child) for name, child in module.named_children() if name not in children}
        down = linear(F, C)
        first = {"gate_up_proj": linear(C, 2 * F)} if packed else {"gate_proj": linear(C, F), "up_proj": linear(C, F)}
        like = stub(module, down_proj=down, **first, **activations)
        tried = [scale * random(B, S, C) for scale in SCALES]
        expected = [like(x) for x in tried]
        for activation in ("silu", "gelu_tanh"):
            ours = [down(ops.swiglu(*(layer(x) for layer in first.values()), activation=activation)) for x in tried]
            if all(map(same, ours, expected)) and same(like.eval()(tried[0]), expected[0]):
                return {"activation": activation, "packed": packed, "own": tuple((name, type(act)) for name, act in activations.items())}
    raise Unlike("its activation is neither SiLU nor GELU's tanh form of the gate, times up")


def rotary(function: Callable) -> dict:
    """How apply_rotary_pos_emb reads its tables, and whether it pairs neighbouring features."""
    failure = Unlike("its apply_rotary_pos_emb turns other pairs")
    for tables, spread in TABLES.items():
        with contextlib.suppress(Unlike), trying():  # tables of the wrong width are a failure of this try alone
            q, k, angles = random(B, H, S, D), random(B, H - 1, S, D), spread(random(B, S, D // 2))
            cos, sin = angles.cos(), angles.sin()
            expected = function(q, k, cos, sin)
            for interleaved in (False, True):
                if all(same(got, e) for got, e in zip(rotate(q, k, cos, sin, tables, interleaved), expected, strict=True)):
                    return {"tables": tables, "interleaved": interleaved}
    raise failure


TABLES = {
    "halves": lambda angles: torch.cat((angles, angles), -1),
    "neighbours": lambda angles: angles.repeat_interleave(2, -1),
    "once": lambda angles: angles,
}
"""How each pair's angle stands in transformers' tables: twice, R/2 apart or side by side, or once."""


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, tables: str, interleaved: bool) -> tuple[Tensor, Tensor]:
    """q (B, H, S, D), k (B, Hk, S, D), cos and sin (B or 1, S, R or R/2) as transformers has them -> the same, rotated."""
    if tables != "once":
        cos, sin = (t[..., : t.shape[-1] // 2] if tables == "halves" else t[..., ::2] for t in (cos, sin))
    positions = None if cos.shape[0] == 1 else torch.arange(cos.shape[0] * cos.shape[1], device=q.device).view(cos.shape[:2])
    q, k = ops.rope(
        q.transpose(1, 2), k.transpose(1, 2), cos.flatten(0, 1), sin.flatten(0, 1), positions=positions, interleaved=interleaved
    )
    return q.transpose(1, 2), k.transpose(1, 2)


def experts(module: nn.Module) -> dict:
    """Nothing: either it is fp.moe of gate_up_proj (E, 2F, C) and down_proj (E, C, F), or not."""
    takes(module, 3)
    weights = dict(module.named_parameters())
    if set(weights) != {"gate_up_proj", "down_proj"} or any(w.dim() != 3 or not w.is_floating_point() for w in weights.values()):
        raise Unlike(f"its parameters are not gate_up_proj (E, 2F, C) and down_proj (E, C, F), but {', '.join(weights)}")
    sizes = module.gate_up_proj.shape, module.down_proj.shape
    if sizes[0] != (sizes[1][0], 2 * sizes[1][2], sizes[1][1]):
        raise Unlike(f"its parameters are not (E, 2F, C) and (E, C, F), but {tuple(sizes[0])} and {tuple(sizes[1])}")
    with trying():
        gate_up, down = random(E, 2 * F, C), random(E, C, F)
        config = copy.copy(getattr(module, "config", SimpleNamespace()))
        config._experts_implementation_internal = "eager"
        parts = {"gate_up_proj": nn.Parameter(gate_up), "down_proj": nn.Parameter(down), "config": config}
        parts |= {name: child for name, child in module.named_children()}
        like = stub(module, num_experts=E, **parts)
        w, chosen = random(B * S, E).softmax(-1).topk(K)
        tried = [scale * random(B * S, C) for scale in SCALES]
        if all(same(ops.moe(x, gate_up, down, w, chosen), like(x, chosen, w)) for x in tried):
            return {}
    raise Unlike("it is not the sum of its experts' SwiGLU networks, each times its weight")


class _Said(nn.Module):
    """A part of a model that says the same whatever it is asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = [answer]

    def forward(self, *_, **__):
        return self.answer[0]


class _Output(SimpleNamespace):
    """A model's output in which whatever is not given is None."""

    def __getattr__(self, name: str) -> None:
        return None


def loss(model: nn.Module) -> dict:
    """What happens to the logits between the head and the loss: a factor, and a cap, or nothing (1.0 and None)."""
    head, body = model.get_output_embeddings(), model.base_model_prefix
    if type(head) is not nn.Linear:
        raise Unlike(f"its output embedding is no nn.Linear but {type(head).__name__}")
    name = next((name for name, child in model.named_children() if child is head), None)
    if name is None or not isinstance(getattr(model, body, None), nn.Module):
        raise Unlike(f"it is not a part {body!r} and a head")
    cap = getattr(model.config, "final_logit_softcapping", None)
    seen = []
    with trying():
        x, logits = random(B, S, C), 10 * random(B, S, V)
        like = stub(model, config=model.config, **{body: _Said(_Output(last_hidden_state=x)), name: _Said(logits)})
        said = logits.sum()
        like.loss_function = lambda *args, **kwargs: seen.append(kwargs["logits"] if "logits" in kwargs else args[0]) or said
        tokens = torch.zeros(B, S, dtype=torch.long)
        output = like(input_ids=tokens, labels=tokens)
        if output.loss is not said:
            raise Unlike("its loss is not what its loss function says")
        if len(seen) == 1 and output.logits is seen[0]:
            factor = float(seen[0].flatten()[0] / logits.flatten()[0])
            if seen[0] is logits or same(seen[0], factor * logits):
                return {"factor": 1.0 if seen[0] is logits else factor, "softcap": None}
            if cap and same(seen[0], cap * torch.tanh(logits / cap)):
                return {"factor": 1.0, "softcap": float(cap)}
    raise Unlike("its logits are changed between the head and the loss, by more than a factor or a cap")
