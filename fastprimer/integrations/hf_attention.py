"""fp.attention behind transformers' attention interface, under the name "fastprimer".

What is causal, or causal within a sliding window, needs no mask, and padding none either: the tokens that are kept are packed, and every
sequence's padding behind it as two more sequences, of queries without keys and of keys without queries. So nothing waits for the device
in a layer, and no shape depends on the lengths. Masks of any other kind (and dropout, biases, heads of more than 256 features) are served
by torch, as transformers would.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from fastprimer import ops

NAME = "fastprimer"


def register() -> str:
    """Make `attn_implementation="fastprimer"` known to transformers; returns that name. Again: no effect."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def configs(model) -> list:
    """Every configuration of a model and its parts, once."""
    found, open_ = {}, [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "sub_configs")]
    while open_:
        config = open_.pop()
        if id(config) not in found:
            found[id(config)] = config
            open_ += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return list(found.values())


def why_not(model) -> str:
    """Why a model must keep its attention, or "": one that does something else for implementations that it knows by name, sparse attention
    for instance, would do it for these alone."""
    from transformers import PreTrainedModel

    if model.config._attn_implementation == NAME:
        return "it is fastprimer's already"
    for file in {type(module).__module__ for module in model.modules() if isinstance(module, PreTrainedModel)}:
        try:
            source = inspect.getsource(sys.modules[file])
        except (KeyError, OSError, TypeError):
            continue
        if BY_NAME.search(source):
            return f"{file.rpartition('.')[2]} asks whether its attention is called sdpa"
    return ""


BY_NAME = re.compile(r"""_attn_implementation\b[^\n]*["'](sdpa|flex_attention)["']""")


class Banded(BlockMask):
    """A mask that is not made: causal or not, within a window of so many keys (None: all), of the keys where padding (B, T) is true
    (None: all). If causal, the S queries are the last S tokens of the same sequences.

    It is a BlockMask by name alone: transformers hands on what is one, or a tensor, of four dimensions, and takes all else for padding.
    """

    def __init__(self, shape: tuple[int, int, int, int], causal: bool, window: Optional[int] = None, padding: Optional[Tensor] = None):
        self.sizes, self.causal, self.window, self.padding = shape, causal, window, padding

    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.sizes

    def to(self, *args, **kwargs) -> Banded:
        return Banded(self.sizes, self.causal, self.window, None if self.padding is None else self.padding.to(*args, **kwargs))

    def __repr__(self) -> str:
        return f"Banded({self.sizes}, causal={self.causal}, window={self.window}, padding={'none' if self.padding is None else 'some'})"


def mask(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset=0,
    q_length: Optional[int] = None,
    q_offset=0,
    cache_position: Optional[Tensor] = None,
    attention_mask: Optional[Tensor] = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    local_size: Optional[int] = None,
    config=None,
    **options,
):
    """What `attention` is handed as its mask: None, a Banded, or the mask itself, (B, 1, S, T), true where a query sees a key.

    transformers says by `allow_is_causal_skip` (`allow_is_bidirectional_skip`) that nothing but causality (nothing at all), a local size
    and padding is masked. The local size is a sliding window's or a chunk's, which the configuration tells apart. The queries' positions
    are q_offset and q_length, in older versions (5.0) all of them, cache_position (S,).
    """
    from transformers.masking_utils import sdpa_mask

    queries = {"q_length": q_length, "q_offset": q_offset}
    if cache_position is not None:
        queries = {"cache_position": cache_position}
        q_length = cache_position.shape[0]
        unseen = q_length == kv_length and not kv_offset  # else the first position is on the device
        q_offset = 0 if unseen else cache_position[0] if torch.compiler.is_compiling() else int(cache_position[0])
    static = isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor)  # a cache with room that is not filled yet
    sliding = local_size is None or (getattr(config, "sliding_window", None) == local_size and not hasattr(config, "attention_chunk_size"))
    causal = allow_is_causal_skip and sliding and not static and q_offset + q_length == kv_offset + kv_length
    full = allow_is_bidirectional_skip and local_size is None and not static
    padding = None if attention_mask is None or static else attention_mask[:, kv_offset : kv_offset + kv_length]
    if (causal or full) and (padding is None or padding.shape[1] == kv_length):
        padding = None if padding is None or _is_all(padding) else padding
        if padding is None and local_size is None:
            return None
        if padding is None or _at_one_end(padding, local_size):
            return Banded((batch_size, 1, q_length, kv_length), causal, local_size, padding)
    known = {"batch_size": batch_size, "kv_length": kv_length, "kv_offset": kv_offset, "attention_mask": attention_mask}
    return sdpa_mask(**known, **queries, allow_is_causal_skip=False, local_size=local_size, **options)


def _is_all(padding: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(padding.all())


def _at_one_end(padding: Tensor, local_size: Optional[int]) -> bool:
    """So that a window of what is kept is that of all tokens, and no query that is padding sees what is kept before it. Compiled
    code cannot look: without a window it takes that for granted."""
    if torch.compiler.is_compiling():
        return local_size is None
    return bool((padding.diff(dim=1).sum(1) <= 1).all())


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    softcap: Optional[float] = None,
    s_aux: Optional[Tensor] = None,
    position_bias: Optional[Tensor] = None,
    cu_seq_lens_q: Optional[Tensor] = None,
    cu_seq_lens_k: Optional[Tensor] = None,
    max_length_q: Optional[int] = None,
    max_length_k: Optional[int] = None,
    indices: Optional[Tensor] = None,
    block_indices: Optional[Tensor] = None,
    **_,
) -> tuple[Tensor, None]:
    """query (B, H, S, D), key (B, Hk, T, D), value (B, Hk, T, Dv) -> o (B, S, H, Dv), and None in place of the probabilities.

    attention_mask is what `mask` made, or any mask (B, 1 or H, S, T), boolean or added to the scores; what it says of windows counts, as
    with SDPA. s_aux (H,) are sinks. Sequences that are packed into a batch of one are told by cu_seq_lens_q and the like, as transformers'
    collators do; a mask that says more than these is heeded.
    """
    if indices is not None or block_indices is not None:
        raise NotImplementedError("fastprimer's attention for transformers: indices: expected None: sparse attention is not supported")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    scores = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    band = attention_mask if isinstance(attention_mask, Banded) else Banded((q.shape[0], 1, q.shape[1], k.shape[1]), causal)
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None and q.shape[0] == 1
    packed = packed and (not isinstance(attention_mask, Tensor) or _is_packing(attention_mask, cu_seq_lens_q, cu_seq_lens_k))
    served = not dropout and position_bias is None and max(q.shape[-1], v.shape[-1]) <= 256
    if not served or (isinstance(attention_mask, Tensor) and not packed):
        return by_torch(q, k, v, band, attention_mask, dropout, position_bias, **scores), None
    window = None if band.window is None else (band.window - 1, 0 if band.causal else band.window - 1)
    options = {"causal": band.causal, "window": window, **scores}
    if packed:
        lengths = {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
        longest = {"max_seqlen_q": None if max_length_q is None else int(max_length_q)}
        longest["max_seqlen_k"] = None if max_length_k is None else int(max_length_k)
        return ops.attention(q[0], k[0], v[0], **lengths, **longest, **options).unsqueeze(0), None
    if band.padding is not None:
        return without_padding(q, k, v, band.padding.to(q.device), **options), None
    return ops.attention(q, k, v, **options), None


def _is_packing(mask: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor) -> bool:
    """Whether a mask (1, 1, S, T) is that of causal sequences of these lengths, and nothing else; each mask is looked at once."""
    if torch.compiler.is_compiling() or mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return False
    if not hasattr(mask, "_is_packing"):
        N = torch.arange(mask.shape[2], device=mask.device)
        of_query, of_key = (torch.bucketize(N, ends.to(mask.device), right=True) for ends in (cu_seq_lens_q, cu_seq_lens_k))
        mask._is_packing = torch.equal(mask[0, 0], (of_query.unsqueeze(1) == of_key) & (N.unsqueeze(1) >= N))
    return mask._is_packing


def without_padding(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, **options) -> Tensor:
    """Attention to the keys where padding (B, T) is true; if causal, of the queries that are such tokens, and 0 for the others."""
    (B, S), T = q.shape[:2], k.shape[1]
    kept_k = padding.bool()
    kept_q = kept_k[:, T - S :] if options["causal"] else kept_k.new_ones(B, S)
    n_k, n_q = kept_k.sum(1), kept_q.sum(1)
    none = torch.zeros_like(n_q)
    ends = [  # of each sequence's tokens, its other queries, and its other keys
        F.pad(torch.stack(lengths, 1).flatten().cumsum(0, dtype=torch.int32), (1, 0))
        for lengths in ((n_q, S - n_q, none), (n_k, none, T - n_k))
    ]
    order_q, order_k = (torch.argsort(kept, dim=1, descending=True, stable=True) for kept in (kept_q, kept_k))
    rows_q, rows_k = _rows(order_q), _rows(order_k)
    q, k, v = q.flatten(0, 1).index_select(0, rows_q), k.flatten(0, 1).index_select(0, rows_k), v.flatten(0, 1).index_select(0, rows_k)
    packed = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    if isinstance(S, int) and isinstance(T, int):  # not symbols of torch.export
        packed |= {"max_seqlen_q": S, "max_seqlen_k": T}
    o = ops.attention(q, k, v, **packed, **options)
    return o.index_select(0, _rows(order_q.argsort(1))).unflatten(0, (B, S))


def _rows(order: Tensor) -> Tensor:
    """The rows of (B N, ...) in the order (B, N) of each sequence's own."""
    B, N = order.shape
    return (order + N * torch.arange(B, device=order.device).unsqueeze(1)).flatten()


def by_torch(q, k, v, band: Banded, mask, dropout: float, position_bias, scale, softcap, sinks) -> Tensor:
    """The same with any mask, bias and dropout: (B, S, H, Dv)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    S, T = q.shape[2], k.shape[2]
    if not isinstance(mask, Tensor):
        distance = torch.arange(T - S, T, device=q.device).unsqueeze(1) - torch.arange(T, device=q.device)
        seen = distance >= 0 if band.causal else torch.ones_like(distance, dtype=torch.bool)
        if band.window is not None:
            seen = seen & (distance.abs() < band.window)
        mask = seen if band.padding is None else seen & band.padding.to(q.device).bool()[:, None, None, :]
    if position_bias is None and softcap is None and sinks is None:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=True)
        return o.transpose(1, 2)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.to(q.dtype)
    bias = bias if position_bias is None else bias + position_bias
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = (q @ k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = (s if softcap is None else softcap * torch.tanh(s / softcap)) + bias
    if sinks is not None:
        s = torch.cat((s, sinks.float()[:, None, None].expand(*s.shape[:-1], 1)), -1)
    unseeing = (s == -torch.inf).all(-1, keepdim=True)  # whose softmax, and its gradient, would be NaN
    p = s.masked_fill(unseeing, 0.0).softmax(-1).masked_fill(unseeing, 0.0)[..., :T]
    return (F.dropout(p, dropout).to(v.dtype) @ v).transpose(1, 2)


__all__ = ["NAME", "attention", "mask", "register"]
