"""The classes that take the place of transformers' layers: each a subclass of the layer's own, with fastprimer in its forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from fastprimer import ops
from fastprimer.integrations import hf_probes
from fastprimer.integrations.hf_probes import Unlike
from fastprimer.losses import LinearCrossEntropy

ROTARY = "apply_rotary_pos_emb"


def looks_like(module: nn.Module) -> list[str]:
    """Which operations are worth a try."""
    name, parts = type(module).__name__, dir(module)
    code = getattr(inspect.unwrap(getattr(type(module), "forward", None)), "__code__", None)  # a scripted module has none
    looks = {
        "rms_norm": name.endswith("RMSNorm"),
        "swiglu": isinstance(getattr(module, "down_proj", None), nn.Module) and ("gate_proj" in parts or "gate_up_proj" in parts),
        "moe": isinstance(getattr(module, "down_proj", None), Tensor) and "gate_up_proj" in parts,
        "rope": code is not None and ROTARY in code.co_names,
    }
    return [operation for operation, it_does in looks.items() if it_does]


def is_ours(module: nn.Module) -> bool:
    return hasattr(type(module), "_fastprimer")


def exchanges(operation: str, module: nn.Module, **given) -> list[tuple[nn.Module, type]]:
    """The module, and where needed a part of it, with the class that each is to have. Raises Unlike."""
    if operation == "linear_cross_entropy":
        options = hf_probes.loss(module) | given
        return [(module, _with_loss(type(module), **options)), (module.get_output_embeddings(), Head)]
    options = BUILDERS[operation].probe(module)
    return [(module, BUILDERS[operation].build(type(module), **options))]


def _subclass(cls: type, **members) -> type:
    """Of the same name, for those who go by names (FSDP's wrapping policies, initialisation, save_pretrained)."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_fastprimer": True}
    return type(cls.__name__, (cls,), named | members)


@functools.cache
def rms_norm(cls: type, eps: float, weight_offset: float, weighted: bool) -> type:
    def forward(self, *args, **kwargs):
        (x,) = (*args, *kwargs.values())
        weight = self.weight if weighted else None
        if weighted and weight.dtype != x.dtype:
            return cls.forward(self, x)
        return ops.rms_norm(x, weight, eps, weight_offset=weight_offset)

    return _subclass(cls, forward=functools.wraps(cls.forward)(forward))


@functools.cache
def swiglu(cls: type, activation: str, packed: bool) -> type:
    def forward(self, *args, **kwargs):
        (x,) = (*args, *kwargs.values())
        projected = (self.gate_up_proj(x),) if packed else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(ops.swiglu(*projected, activation=activation))

    return _subclass(cls, forward=functools.wraps(cls.forward)(forward))


@functools.cache
def moe(cls: type) -> type:
    def forward(self, hidden_states, top_k_index, top_k_weights):
        x, gate_up = hidden_states, self.gate_up_proj
        mixed = x.dtype != gate_up.dtype and not torch.is_autocast_enabled(x.device.type)
        if mixed or x.dim() != 2 or getattr(self, "_is_expert_parallel", False):
            return cls.forward(self, hidden_states, top_k_index, top_k_weights)
        return ops.moe(x, gate_up, self.down_proj, top_k_weights, top_k_index)

    return _subclass(cls, forward=functools.wraps(cls.forward)(forward))


@functools.cache
def rope(cls: type, tables: str, interleaved: bool) -> type:
    original = _rotary(cls)

    def rotary(q, k, cos, sin, *args, **kwargs):
        usual = not args and kwargs in ({}, {"unsqueeze_dim": 1}) and q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape
        fits = usual and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[2] and cos.shape[2] <= q.shape[3]
        mixed = cos.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type)
        if not fits or mixed or q.dtype != k.dtype or cos.requires_grad:
            return original(q, k, cos, sin, *args, **kwargs)
        return hf_probes.rotate(q, k, cos, sin, tables, interleaved)

    return _subclass(cls, forward=_rebound(cls.forward, rotary))


def _rotary(cls: type) -> Callable:
    function = inspect.unwrap(cls.forward).__globals__.get(ROTARY)
    if function is None:
        raise Unlike(f"it takes {ROTARY} from nowhere")
    return function


def _rebound(function: Callable, rotary: Callable) -> Callable:
    """The same function, within the same wrappers, that finds another apply_rotary_pos_emb among its globals."""
    inner, known, cells = getattr(function, "__wrapped__", None), function.__globals__, function.__closure__
    if inner is None:
        known = {**known, ROTARY: rotary}
        del known["__name__"]  # by which torch.compile would find the module's globals instead
    else:
        again = _rebound(inner, rotary)
        cells = tuple(CellType(again) if cell.cell_contents is inner else cell for cell in cells or ())
        if all(cell is old for cell, old in zip(cells, function.__closure__ or (), strict=True)):
            raise Unlike("its forward is wrapped in a way that cannot be followed")
    twin = FunctionType(function.__code__, known, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(twin, function)
    if inner is None:
        del twin.__wrapped__
    else:
        twin.__wrapped__ = again
    return twin


class Question:
    """What a model's head is asked for in place of the logits: their loss with these labels."""

    def __init__(self, criterion: LinearCrossEntropy, factor: float, labels: Tensor, items):
        self.criterion, self.factor, self.labels, self.items = criterion, factor, labels, items
        self.loss: Optional[Tensor] = None

    def answer(self, x: Tensor, head: nn.Linear) -> None:
        items = self.items.to(x.device) if isinstance(self.items, Tensor) else self.items
        x = x if self.factor == 1.0 else x * self.factor
        bias = None if head.bias is None else head.bias * self.factor
        self.loss = self.criterion(x, head.weight, self.labels.to(x.device), bias=bias, num_items_in_batch=items)

    def in_place_of_the_loss(self, *_, **__) -> Tensor:
        return self.loss


class Head(nn.Linear):
    """An output embedding that can be asked for the loss at once; it hands on x then, in place of the logits."""

    asked: Optional[Question] = None
    _fastprimer = True

    def forward(self, x: Tensor) -> Tensor:
        if self.asked is None or type(self.weight) not in (nn.Parameter, Tensor):  # nor a shard of it
            return super().forward(x)
        self.asked.answer(x, self)
        return x


@functools.cache
def _with_loss(cls: type, factor: float, softcap: Optional[float], memory_budget: Optional[int]) -> type:
    from transformers.loss.loss_utils import LOSS_MAPPING

    criteria = {shift: LinearCrossEntropy(shift=shift, softcap=softcap, memory_budget=memory_budget) for shift in (True, False)}
    original = cls.loss_function

    def forward(self, *args, **kwargs):
        head, labels, shifted = self.get_output_embeddings(), kwargs.get("labels"), kwargs.get("shift_labels")
        said = kwargs.get("return_dict")
        as_dict = self.config.return_dict if said is None else said
        usual = labels is not None and kwargs.get("ignore_index", -100) == -100 and original.fget(self) is LOSS_MAPPING["ForCausalLM"]
        if not (usual and as_dict and self.training and isinstance(head, Head)):
            return cls.forward(self, *args, **kwargs)
        asked = Question(criteria[shifted is None], factor, labels if shifted is None else shifted, kwargs.get("num_items_in_batch"))
        head.asked = asked
        try:
            output = cls.forward(self, *args, **kwargs)
        finally:
            head.asked = None
        return output if asked.loss is None else type(output)(**{name: part for name, part in output.items() if name != "logits"})

    def loss_function(self):
        asked = getattr(self.get_output_embeddings(), "asked", None)
        return original.fget(self) if asked is None or asked.loss is None else asked.in_place_of_the_loss

    members = {"forward": functools.wraps(cls.forward)(forward), "loss_function": property(loss_function, original.fset)}
    return _subclass(cls, **members)


class Builder(NamedTuple):
    probe: Callable[[nn.Module], dict]
    build: Callable[..., type]


BUILDERS = {
    "rms_norm": Builder(hf_probes.rms_norm, rms_norm),
    "swiglu": Builder(hf_probes.swiglu, swiglu),
    "rope": Builder(lambda module: hf_probes.rotary(_rotary(type(module))), rope),
    "moe": Builder(hf_probes.experts, moe),
}
