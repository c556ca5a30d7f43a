"""Decoding with a model: the keys and values of the tokens that it has read, and on a GPU one more token as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fastprimer import ops
from fastprimer.ops._arguments import needs_gradient
from fastprimer.ops.decoding import MAX_QUERIES

Result = TypeVar("Result")

WARM_UP = 3
"""Calls before a capture, in which libraries choose their algorithms and allocate what they keep."""


class LayerCache:
    """The keys and values that one attention layer has seen: (B, T, Hk, D) each, the first `length` of T filled."""

    def __init__(self, k: Tensor, v: Tensor, lengths: Tensor | None = None):
        """lengths: int32 (B,), a copy of `length` on the device, which its owner keeps equal to it."""
        self.k, self.v, self.lengths = k, v, lengths
        self.length = 0

    @property
    def room(self) -> int:
        """T."""
        return self.k.shape[1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: tuple | None) -> Tensor:
        """Append k and v, then let q, the same tokens' queries, see all keys up to its own."""
        start, stop = self.length, self.length + q.shape[1]
        if stop > self.room:
            raise ValueError(f"cache: expected at most {self.room} tokens, got {stop}")
        if needs_gradient(q, k, v):
            raise RuntimeError("cache: its keys and values have no gradient: call the model under torch.no_grad()")
        if q.shape[1] <= MAX_QUERIES:  # more are a prompt
            lengths = self.lengths
            if lengths is None:
                lengths = torch.full((q.shape[0],), start, dtype=torch.int32, device=q.device)
            output = ops.attention_with_kv_cache(q, self.k, self.v, lengths, k=k, v=v, causal=True, window=window)
        else:
            self.k[:, start:stop], self.v[:, start:stop] = k, v
            output = ops.attention(q, self.k[:, :stop], self.v[:, :stop], causal=True, window=window)
        self.length = stop  # only now: a call that failed can be repeated
        return output


class Cache:
    """What the layers of a model have seen of B sequences, the same number of tokens of each; Model.new_cache makes one.

    How many these are stands on the device too, where a replayed CUDA graph finds it: one token is read at the place that it
    says, whatever it said when the graph was captured.

    Args:
        layers: number of layers.
        k: zeros (B, T, Hk, D): of its shape, dtype and device are all keys and values.
        cos, sin: (T, R/2), the tables of fp.rope for the positions 0..T-1.
    """

    def __init__(self, layers: int, k: Tensor, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin
        self.length = 0
        with torch.inference_mode(False):  # tensors made in that mode could be written in it alone
            self.lengths = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
            self.layers = [LayerCache(torch.zeros_like(k), torch.zeros_like(k), self.lengths) for _ in range(layers)]
        self.place_on_device = k.device.type != "cpu"

    @property
    def room(self) -> int:
        """T."""
        return self.cos.shape[0]

    def begin(self, batch: int, S: int, layers: int) -> tuple[Tensor, Tensor]:
        """Before S more tokens of each sequence go through the layers: their rows of cos and sin."""
        held = self.lengths.shape[0], len(self.layers)
        if (batch, layers) != held:
            raise ValueError(f"cache: expected one of {batch} sequences in {layers} layers, got one of {held[0]} in {held[1]}")
        stop = self.length + S
        if stop > self.room:
            raise ValueError(f"cache: expected at most {self.room} tokens, got {stop}")
        for layer in self.layers:
            layer.length = self.length  # some are longer where a call has failed between two of them
        if S == 1 and self.place_on_device and len(self.lengths):
            return self.cos.index_select(0, self.lengths[:1]), self.sin.index_select(0, self.lengths[:1])
        return self.cos[self.length : stop], self.sin[self.length : stop]

    def end(self, S: int) -> None:
        """After all has been computed from the S tokens: a call that failed before can be repeated."""
        self.lengths += S
        self.length += S

    def keep(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cache: length: expected one of 0..{self.length}, got {length}")
        self.length = length
        self.lengths.fill_(length)


class NextToken:
    """Reads one token of each sequence: tokens (B, 1) -> logits (B, V), and the cache is longer by one.

    On a GPU it is captured as a CUDA graph at once, because a token's kernels take less time than their launches; `reason` says why it
    could not be, or is empty. The logits of a graph are good until the next call. To be used under torch.no_grad(), while the model's
    weights stay where they are.
    """

    def __init__(self, model: Callable, cache: Cache):
        self.model, self.cache = model, cache
        limit, device = model.config.longest_sequence, cache.lengths.device
        self.room = min(cache.room, limit or cache.room)
        self.token = torch.zeros(len(cache.lengths), 1, dtype=torch.int64, device=device)
        start = cache.length

        def read() -> Tensor:
            cache.length = start  # a graph does the rest: its replays count on the device alone
            return self._read(self.token)

        self.replay, self.reason = captured(read, device, lambda: cache.keep(start))

    def _read(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, cache=self.cache)[:, -1]

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.reason:
            return self._read(tokens)
        if self.cache.length >= self.room:
            raise ValueError(f"NextToken: expected at most {self.room} tokens, the {self.cache.length} in the cache included, got one more")
        self.token.copy_(tokens)
        logits = self.replay()
        self.cache.length += 1
        return logits


def captured(
    call: Callable[[], Result], device: torch.device, undo: Callable[[], object] = lambda: None
) -> tuple[Callable[[], Result], str]:
    """(call as one CUDA graph, "") or (call, why it cannot be one).

    `undo` takes back what a call has changed that the next one, or the first replay, must not find; of the capture, in which nothing
    runs on the device, that is what its Python did.
    """
    if device.type != "cuda":
        return call, f"a CUDA graph is for a GPU, not for {device.type}"
    with torch.cuda.device(device):  # streams and graphs are the current device's
        current, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    call()
                    undo()
            current.wait_stream(side)
            # By itself it would capture on a stream that torch made once, on whichever device was current then.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                result = call()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own in force
            return call, f"failed: {str(error).splitlines()[0]}"
        finally:
            undo()

    def replayed() -> Result:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replayed, ""
