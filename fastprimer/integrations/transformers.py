"""Hugging Face models on fastprimer's kernels: one call, one model, and back.

    from fastprimer.integrations.transformers import patch

    patched = patch(model)   # before it is wrapped, hooked or compiled; then train or generate as ever, Trainer included
    print(patched)           # what is replaced, and what is left alone and why
    patched.undo()           # or: with patch(model): ...

Nothing is replaced by the name of a model or the version of transformers. A layer that looks as if it were a certain operation is run, with
small random weights in float32 on the CPU, beside that operation (hf_probes.py); only where both agree is its class exchanged, for a
subclass whose forward calls fastprimer. Parameters, state_dict, hooks, adapters and other models stay what they are. A call that is of
another kind than what was tried (weights of another dtype than x, ...) goes to the original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import nn

from fastprimer.config import is_count
from fastprimer.integrations import hf_attention, hf_layers
from fastprimer.integrations.hf_probes import Unlike

OPERATIONS = (*hf_layers.BUILDERS, "attention", "linear_cross_entropy")


class Patch:
    """What `patch` has done to a model; as a context manager it undoes it at the end.

    Attributes:
        model: the model itself.
        replaced: how many layers of each "LlamaRMSNorm: rms_norm".
        left: why, for each such pair that was looked at and left alone.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.replaced: Counter[str] = Counter()
        self.left: dict[str, str] = {}
        self._exchanged: list[nn.Module] = []
        self._implementations: list[tuple[object, str | None]] = []

    def undo(self) -> nn.Module:
        """Give every layer its own class back, and the model its attention; returns the model. Again: no effect.

        Raises:
            RuntimeError: something has wrapped a layer since (fully_shard, parametrize, ...); nothing is undone then.
        """
        ours = [module for module in {*self._exchanged, *self.model.modules()} if hf_layers.is_ours(module)]  # copies too, as peft makes
        for module in ours:
            if hf_layers.original_class(module) is None:
                name = type(module).__name__
                raise RuntimeError(f"patch: undo: expected every layer as it was left, got a {name}, which was wrapped since")
        for module in ours:
            module.__class__ = hf_layers.original_class(module)
        for config, implementation in self._implementations:
            config._attn_implementation_internal = implementation
        self._exchanged, self._implementations = [], []
        return self.model

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def __str__(self) -> str:
        replaced = [f"{count:4} x {what}" for what, count in self.replaced.items()]
        return "\n".join([*replaced, *(f"left alone: {what}: {reason}" for what, reason in self.left.items())])

    def _exchange(self, operation: str, module: nn.Module, **options) -> None:
        """Give the module a class that computes by the operation, if it can be shown to be that; else say why not."""
        what = f"{type(module).__name__}: {operation}"
        try:
            if "forward" in vars(module):
                raise Unlike("it has a forward of its own (a hook of accelerate?)")
            exchanges = hf_layers.exchanges(operation, module, **options)
        except Unlike as reason:
            self.left[what] = str(reason)
            return
        for part, ours in exchanges:
            self._exchanged.append(part)
            part.__class__ = ours
        self.replaced[what] += 1

    def _attend(self, model) -> None:
        what = f"{type(model).__name__}: attention"
        reason = hf_attention.why_not(model)
        if not reason:
            before = [(config, config._attn_implementation_internal) for config in hf_attention.configs(model)]
            model.set_attn_implementation(hf_attention.register())
            if model.config._attn_implementation != hf_attention.NAME:
                reason = "it does not choose its attention by transformers' AttentionInterface"
            self._implementations += before
        if reason:
            self.left[what] = reason
        else:
            self.replaced[what] += 1


def patch(model: nn.Module, *, only: Collection[str] = OPERATIONS, memory_budget: int | None = None) -> Patch:
    """Let a transformers model compute by fastprimer, in place.

    Args:
        model: a transformers.PreTrainedModel, a module around one (peft's), or any module of such layers; before fully_shard, torch.compile
            or accelerate's hooks.
        only: some of "rms_norm", "swiglu", "rope", "moe", "attention", "linear_cross_entropy"; default: all.
        memory_budget: of `fp.linear_cross_entropy`: bytes of logits that may be kept for backward, which computes the rest once more.

    With "linear_cross_entropy" a model in training mode that is given labels returns its loss, whose logits are formed a piece at a time,
    and None in their place; in eval mode it returns them as ever; hooks of the head have it compute them. Two threads must not train
    one model so. "attention" returns no probabilities (output_attentions), as SDPA does, and 0 for queries that are padding, as
    FlashAttention does: what such positions say is another than before. Models that share a config share its attention. A patched model can
    be pickled, but with "attention" alone another process has to call fastprimer.integrations.hf_attention.register() before it runs.
    generate_batch (continuous batching) takes transformers' own attentions alone, and quantize_dynamic({nn.Linear}) takes the patched head
    for another class: undo that first.

    Returns:
        A Patch: what was replaced, what was left alone and why, and the way back.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: model is no module, or is patched already; an unknown operation; no such budget.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model: expected a module, got {type(model).__name__}")
    if isinstance(only, str) or not set(only) <= set(OPERATIONS):
        raise ValueError(f"patch: only: expected some of {', '.join(OPERATIONS)}, got {only!r}")
    if memory_budget is not None and not is_count(memory_budget, 0):
        raise ValueError(f"patch: memory_budget: expected None or a number of bytes >= 0, got {memory_budget!r}")
    if any(hf_layers.is_ours(module) for module in model.modules()):
        raise ValueError("patch: model: expected one that is not patched, got one that is: undo that first")
    done = Patch(model)
    for module in list(model.modules()):
        for operation in hf_layers.looks_like(module):
            if operation in only:
                done._exchange(operation, module)
    whole: list[str] = []  # the outermost models, within adapters, say
    for name, module in list(model.named_modules()):
        if not isinstance(module, PreTrainedModel) or any(outer == "" or name.startswith(f"{outer}.") for outer in whole):
            continue
        whole.append(name)
        if "attention" in only:
            done._attend(module)
        if "linear_cross_entropy" in only and module.get_output_embeddings() is not None:
            done._exchange("linear_cross_entropy", module, memory_budget=memory_budget)
    return done


__all__ = ["OPERATIONS", "Patch", "patch"]
