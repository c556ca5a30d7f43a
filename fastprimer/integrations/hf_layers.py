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
from fastprimer.integrations import hf_attention, hf_probes
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


def original_class(module: nn.Module) -> Optional[type]:
    """The class that ours took the place of; None for a module of any other class, also of one made of ours since."""
    return vars(type(module)).get("_fastprimer")


def exchanges(operation: str, module: nn.Module, **given) -> list[tuple[nn.Module, type]]:
    """The module, and where needed a part of it, with the class that each is to have. Raises Unlike."""
    if operation == "linear_cross_entropy":
        options = hf_probes.loss(module) | given
        return [(module, with_loss(type(module), *options.values())), (module.get_output_embeddings(), Head)]
    options = BUILDERS[operation].probe(module)
    return [(module, BUILDERS[operation].build(type(module), *options.values()))]


def _subclass(cls: type, build: Callable[..., type], options: tuple, **members) -> type:
    """Of the same name, for those who go by names (FSDP's wrapping policies, initialisation, save_pretrained)."""

    def __reduce_ex__(self, protocol):  # to pickle it: the class has no place of its own
        _, _, *rest = object.__reduce_ex__(self, protocol)
        return _made, (build, cls, options), *rest

    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), named | {"_fastprimer": cls, "__reduce_ex__": __reduce_ex__} | members)


def _made(build: Callable[..., type], cls: type, options: tuple) -> nn.Module:
    hf_attention.register()  # in another process than patch's
    made = build(cls, *options)
    return made.__new__(made)


@functools.cache
def rms_norm(cls: type, eps: float, weight_offset: float, weighted: bool) -> type:
    def forward(self, *args, **kwargs):
        (x,) = (*args, *kwargs.values())
        weight = self.weight if weighted else None
        if weighted and weight.dtype != x.dtype:
            return cls.forward(self, x)
        return ops.rms_norm(x, weight, eps, weight_offset=weight_offset)

    return _subclass(cls, rms_norm, (eps, weight_offset, weighted), forward=functools.wraps(cls.forward)(forward))


@functools.cache
def swiglu(cls: type, activation: str, packed: bool, own: tuple[tuple[str, type], ...]) -> type:
    def forward(self, *args, **kwargs):
        (x,) = (*args, *kwargs.values())
        for name, kind in own:  # the activation, whose hooks expect to be called, and which may have been replaced
            act = getattr(self, name)
            if type(act) is not kind or hf_probes.hooked(act):
                return cls.forward(self, x)
        projected = (self.gate_up_proj(x),) if packed else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(ops.swiglu(*projected, activation=activation))

    return _subclass(cls, swiglu, (activation, packed, own), forward=functools.wraps(cls.forward)(forward))


@functools.cache
def moe(cls: type) -> type:
    def forward(self, hidden_states, top_k_index, top_k_weights):
        x, gate_up = hidden_states, self.gate_up_proj
        mixed = x.dtype != gate_up.dtype and not torch.is_autocast_enabled(x.device.type)
        if mixed or x.dim() != 2 or getattr(self, "_is_expert_parallel", False):
            return cls.forward(self, hidden_states, top_k_index, top_k_weights)
        return ops.moe(x, gate_up, self.down_proj, top_k_weights, top_k_index)

    return _subclass(cls, moe, (), forward=functools.wraps(cls.forward)(forward))


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

    return _subclass(cls, rope, (tables, interleaved), forward=_rebound(cls.forward, rotary))


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
    """A loss that a model is to find without the logits: its head hands on x in their place, and its loss function asks the head."""

    def __init__(self, options: dict, factor: float):
        self.options, self.factor = options, factor
        self.x: Optional[Tensor] = None

    def loss(self, head: nn.Linear, labels, vocab_size=None, num_items_in_batch=None, ignore_index=-100, shift_labels=None) -> Tensor:
        """With the arguments of transformers' ForCausalLMLoss, but for the logits."""
        x = self.x if self.factor == 1.0 else self.x * self.factor
        bias = None if head.bias is None else head.bias * self.factor
        items = num_items_in_batch.to(x.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        criterion = LinearCrossEntropy(shift=shift_labels is None, ignore_index=ignore_index, **self.options)
        labels = labels if shift_labels is None else shift_labels
        return criterion(x, head.weight, labels.to(x.device), bias=bias, num_items_in_batch=items)


class Head(nn.Linear):
    """An output embedding that hands on x where it was asked to."""

    asked: Optional[Question] = None
    _fastprimer = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        hooked = hf_probes.hooked(self)  # by what expects logits, or brings weights for this moment alone
        if self.asked is None or hooked or type(self.weight) not in (nn.Parameter, Tensor):  # nor a shard of it
            return super().forward(x)
        self.asked.x = x
        return x


@functools.cache
def with_loss(cls: type, factor: float, softcap: Optional[float], memory_budget: Optional[int]) -> type:
    from transformers.loss.loss_utils import LOSS_MAPPING

    options, original = {"softcap": softcap, "memory_budget": memory_budget}, cls.loss_function

    def forward(self, *args, **kwargs):
        head, said = self.get_output_embeddings(), kwargs.get("return_dict")
        as_dict = self.config.return_dict if said is None else said
        usual = kwargs.get("labels") is not None and as_dict and original.fget(self) is LOSS_MAPPING["ForCausalLM"]
        if not (usual and self.training and isinstance(head, Head)):
            return cls.forward(self, *args, **kwargs)
        head.asked = asked = Question(options, factor)
        try:
            output = cls.forward(self, *args, **kwargs)
        finally:
            head.asked = None
        return output if asked.x is None else type(output)(**{name: part for name, part in output.items() if name != "logits"})

    def loss_function(self):
        head = self.get_output_embeddings()
        asked = getattr(head, "asked", None)
        if asked is None or asked.x is None:
            return original.fget(self)
        return lambda logits, labels, *args, **kwargs: asked.loss(head, labels, *args, **_known(kwargs))

    members = {"forward": functools.wraps(cls.forward)(forward), "loss_function": property(loss_function, original.fset)}
    return _subclass(cls, with_loss, (factor, softcap, memory_budget), **members)


def _known(kwargs: dict) -> dict:
    """Of what a model hands to its loss function, what that heeds."""
    return {name: value for name, value in kwargs.items() if name in ("vocab_size", "num_items_in_batch", "ignore_index", "shift_labels")}


class Builder(NamedTuple):
    probe: Callable[[nn.Module], dict]
    """What `build` is to be given besides the class, in that order."""
    build: Callable[..., type]


BUILDERS = {
    "rms_norm": Builder(hf_probes.rms_norm, rms_norm),
    "swiglu": Builder(hf_probes.swiglu, swiglu),
    "rope": Builder(lambda module: hf_probes.rotary(_rotary(type(module))), rope),
    "moe": Builder(hf_probes.experts, moe),
}
