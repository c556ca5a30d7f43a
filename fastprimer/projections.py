"""Several linear layers of one input as one product, without another parameter or another name.

Decoding multiplies one row, or a few, by every weight of the model: it is bound by their bytes, and by what each product costs
besides. Where the weights of such layers lie one after another in memory they are one matrix, and their outputs are columns of
one output. The parameters stay what they were: state_dict, optimizers and checkpoints see no difference. (Only what looks for tensors
of one memory does: `safetensors.torch.save_model` refuses them; `save_file` of a state_dict and `save_pretrained` do not.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


class Projecting(nn.Module):
    """A layer that begins with several linear layers of one input."""

    packed = False

    def projections(self) -> tuple[nn.Module, ...]:
        """These layers, in the order in which their weights are packed."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """What each of them makes of x; packed: by one product, if their weights still are one matrix."""
        layers = self.projections()
        if self.packed and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            weight, sizes = _one_matrix(layers)
            if weight is not None:
                return torch.split_with_sizes(F.linear(x, weight), sizes, -1)
        return [layer(x) for layer in layers]


def pack_projections(model: nn.Module) -> nn.Module:
    """Let q, k and v of every fastprimer attention layer in `model`, and gate and up of every SwiGLU, be computed by one product each
    wherever no gradient is wanted. For decoding on a GPU, where each product is a launch (on a CPU it gains 0 to 7%); best called when the
    weights are where they will stay.

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
    if not all(is_plain(layer) for layer in layers) or len({(layer.weight.dtype, layer.weight.device) for layer in layers}) > 1:
        return
    with torch.no_grad():
        together = torch.cat([layer.weight for layer in layers])
        for layer, part in zip(layers, together.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part


def _one_matrix(layers: Sequence[nn.Module]) -> tuple[Tensor | None, list[int]]:
    """The weights of plain layers as one (all rows, C), and their numbers of rows, if they follow each other in one piece of memory."""
    sizes, place, first = [], None, None
    for layer in layers:
        if not is_plain(layer):
            return None, sizes
        weight = layer.__dict__["_parameters"]["weight"]
        if first is None:
            first, place = weight, weight.data_ptr()
        if weight.data_ptr() != place or not weight.is_contiguous():
            return None, sizes
        place += weight.nbytes
        sizes.append(weight.shape[0])
    storage = first.untyped_storage()
    if place > storage.data_ptr() + storage.nbytes():  # neighbours by chance
        return None, sizes
    return first.as_strided((sum(sizes), first.shape[1]), first.stride()), sizes


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer means no more than a product with its weight. Looks past nn.Module's own, slow, lookup."""
    inside = layer.__dict__
    parameters = inside["_parameters"]
    return (
        type(layer) is nn.Linear
        and type(parameters.get("weight")) is nn.Parameter
        and parameters["bias"] is None
        and "forward" not in inside
        and not (inside["_forward_hooks"] or inside["_forward_pre_hooks"] or inside["_backward_hooks"] or inside["_backward_pre_hooks"])
        and not _has_any_global_hook()
    )
