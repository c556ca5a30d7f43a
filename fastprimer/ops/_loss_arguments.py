"""What both cross-entropies ask of their arguments."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from fastprimer.config import is_count, is_number
from fastprimer.ops import _arguments as arguments


def options(name, ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse, return_argmax):
    """The checked options, in the order in which every backend takes them."""
    arguments.check(reduction in ("mean", "sum", "none"), f"{name}: reduction", "'mean', 'sum' or 'none'", repr(reduction))
    check_integer(f"{name}: ignore_index", ignore_index, "an integer of 64 bits", -(2**63))
    smooth = is_number(label_smoothing) and 0 <= label_smoothing <= 1
    arguments.check(smooth, f"{name}: label_smoothing", "a number in 0..1", label_smoothing)
    arguments.check(is_number(z_loss) and abs(z_loss) < 2**126, f"{name}: z_loss", "a finite number (below 2^126)", z_loss)
    arguments.check_softcap(name, softcap)
    arguments.check_flag(f"{name}: return_lse", return_lse)
    arguments.check_flag(f"{name}: return_argmax", return_argmax)
    return ignore_index, float(label_smoothing), float(z_loss), None if softcap is None else float(softcap)


def check_budget(name: str, memory_budget: object) -> None:
    if memory_budget is not None:
        check_integer(f"{name}: memory_budget", memory_budget, "None or a number of bytes >= 0", 0)


def check_integer(name: str, value: object, expected: str, least: int) -> None:
    if not is_count(value, least) or value >= 2**63:
        arguments.refuse(name, expected, repr(value))  # whose text torch.compile cannot make of a size


def check_projection(name: str, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    if weight.numel() == 0 or weight.dim() != 2:
        raise ValueError(
            f"{name}: weight: expected shape (V, C), not empty, got {tuple(weight.shape)}; a parameter that is sharded or "
            "flattened (ZeRO-3, FSDP) must be gathered before it is used here"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        arguments.refuse(f"{name}: x", f"shape (..., C = {weight.shape[1]})", tuple(x.shape))
    arguments.check_like(f"{name}: weight", weight, x, "x")
    if bias is not None:
        arguments.check_shape(f"{name}: bias", bias, weight.shape[:1], "(V,)")
        arguments.check_device(f"{name}: bias", bias, x, "x")


def checked_target(name: str, target: Tensor, x: Tensor, V: int, ignore_index: int) -> tuple[Tensor, bool]:
    """The targets, and whether every token is known to count: the usual case, in which one look at them is enough, and none at their
    number."""
    arguments.check_integer(f"{name}: target", target)
    arguments.check_shape(f"{name}: target", target, x.shape[:-1], "of the tokens")
    arguments.check_device(f"{name}: target", target, x, "the logits")
    target = target.long()  # 32 bits would wrap the number that they are compared with
    if not arguments.inspectable(target) or target.numel() == 0:
        return target, False
    least, most = torch.aminmax(target)
    if 0 <= least.item() and most.item() < V:
        return target, not 0 <= ignore_index < V
    wrong = (target != ignore_index) & ((target < 0) | (target >= V))
    if bool(wrong.any()):
        raise ValueError(f"{name}: target: expected numbers in 0..{V - 1} or ignore_index={ignore_index}, got {target[wrong][0].item()}")
    return target, False
