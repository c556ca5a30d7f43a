"""Several linear layers of one input as one product, without another parameter or another name.

Decoding multiplies one row, or a few, by every weight of the model: it is bound by their bytes, and by what each product costs
besides. Where the weights of such layers lie one after another in memory they are one matrix, and their outputs are columns of
one output. The parameters stay what they were: state_dict, optimizers and checkpoints see no difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projecting(nn.Module):
    """A layer that begins with several linear layers of one input."""

    packed = False

    def projections(self) -> tuple[nn.Module, ...]:
        """These layers, in the order in which their weights are packed."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """What each of them makes of x; packed: by one product, if their weights still are one matrix."""
        layers = self.projections()
        weight = _together(layers) if self.packed else None
        if weight is None:
            return [layer(x) for layer in layers]
        return F.linear(x, weight).split([layer.out_features for layer in layers], -1)


def pack_projections(model: nn.Module) -> nn.Module:
    """Let q, k and v of every fastprimer attention layer in `model`, and gate and up of every SwiGLU, be computed by one product each
    wherever no gradient is wanted. For decoding; best called when the weights are where they will stay.

    In place: the same parameters with the same values, in other memory (an earlier CUDA graph must not be replayed). What later gives
    a parameter memory of its own (`to`, `load_state_dict(assign=True)`) ends it for its layer, as does a hook, an adapter or any other
    layer in a projection's place, which then are called as ever.

    Returns:
        model.
    """
    for module in model.modules():
        if isinstance(module, Projecting):
            _pack(module.projections())
            module.packed = True
    return model


def _pack(layers: Sequence[nn.Module]) -> None:
    if not all(_plain(layer) for layer in layers) or len({(layer.weight.dtype, layer.weight.device) for layer in layers}) > 1:
        return
    with torch.no_grad():
        together = torch.cat([layer.weight for layer in layers])
        for layer, part in zip(layers, together.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part


def _together(layers: Sequence[nn.Module]) -> Tensor | None:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(_plain(layer) for layer in layers):
        return None
    first = layers[0].weight
    place, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for layer in layers:
        weight = layer.weight
        if weight.data_ptr() != place or weight.untyped_storage().data_ptr() != storage or not weight.is_contiguous():
            return None
        place += weight.numel() * weight.element_size()
    return first.as_strided((sum(layer.out_features for layer in layers), first.shape[1]), first.stride())


def _plain(layer: nn.Module) -> bool:
    """Whether calling it means no more than a product with its weight."""
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__
        and layer.bias is None
        and type(layer.weight) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )
