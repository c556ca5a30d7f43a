"""The decoder on the fast layers: what fastprimer.reference.Model computes, with the same parameters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprimer import ops
from fastprimer.checkpoint import CheckpointError, read_json, read_weights, write_atomically, write_weights
from fastprimer.config import Config, is_count
from fastprimer.decoding import Cache
from fastprimer.layers import DecoderLayer, RMSNorm, RotaryEmbedding
from fastprimer.ops import _arguments as arguments
from fastprimer.projections import is_plain
from fastprimer.reference import check_config, initialize

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding.from_config(config)

    def forward(
        self, tokens: Tensor, positions: Tensor | None, cache: Cache | None, longest: int | Tensor | None
    ) -> Tensor:  # (B, S) -> (B, S, C); who calls it ends the cache's S tokens, once nothing can fail
        S = tokens.shape[1]
        x, residual, rows = self._embedded(tokens), None, None
        seen = None if cache is None else cache.begin(*tokens.shape, len(self.layers))
        if positions is not None:  # a table of just these positions, in order
            rows = torch.arange(positions.numel(), device=tokens.device).view(positions.shape)
            cos, sin = self.rotary(positions.flatten(), x.dtype, longest)
        elif seen is None or longest is not None:
            start = 0 if cache is None else cache.length
            cos, sin = self.rotary(torch.arange(start, start + S, device=tokens.device), x.dtype, longest)
        else:
            cos, sin = seen
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, cos, sin, rows, None if cache is None else cache.layers[index])
        return self.norm(x, residual)[0]

    def _embedded(self, tokens: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.embed_tokens(tokens)
        try:
            return self.embed_tokens(tokens)
        except IndexError:  # on the CPU: a GPU would have to be waited for
            least, most, V = int(tokens.min()), int(tokens.max()), self.embed_tokens.num_embeddings
            if least >= 0 and most < V:
                raise
            raise ValueError(f"Model: tokens: expected numbers from 0 to {V - 1}, got {least} to {most}") from None


class Model(nn.Module):
    """A decoder with a language-model head, which is the embedding itself where the config ties them."""

    def __init__(self, config: Config):
        super().__init__()
        check_config(config)
        self.config = config
        self.generation_config: dict | None = None
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize(self, config.initializer_range)

    def logits(self, x: Tensor) -> Tensor:  # (B, S, C) -> (B, S, V)
        return F.linear(x, self.model.embed_tokens.weight) if self.config.tie_word_embeddings else self.lm_head(x)

    def loss(self, x: Tensor, labels: Tensor, memory_budget: int | None = None) -> Tensor:
        """x (B, S, C), labels (B, S) -> the mean; without logits, where the head is no more than a product with its weight."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if head is self.model.embed_tokens or is_plain(head):
            return ops.linear_cross_entropy(x, head.weight, labels, memory_budget=memory_budget)
        return ops.cross_entropy(head(x), labels)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        longest: int | Tensor | None = None,
        logits_to_keep: int = 0,
        memory_budget: int | None = None,
    ) -> Tensor:
        """tokens (B, S) -> logits (B, S, V), or with labels (B, S) the mean loss of predicting each from the tokens before it.

        Args:
            labels: -100 is not counted. The logits are not formed at once, unless another layer stands in the place of lm_head, or it has
                hooks, an adapter or a bias.
            positions: (B, S), by default 0..S-1 after what the cache holds.
            cache: from new_cache; the tokens follow those that it holds, and are added to it. Needs torch.no_grad(). All of them
                count for max_position_embeddings.
            longest: the number of positions that the frequencies of a rope_type "dynamic" or "longrope" are for; by default the
                room of the cache, and without one the greatest position + 1. See fastprimer/rotary.py.
            logits_to_keep: without labels, compute the logits of the last so many tokens alone; 0: of all.
            memory_budget: with labels, bytes of logits that are kept for the backward pass, which computes the others again: see
                fastprimer.linear_cross_entropy. Where another layer than a plain head forms them, all are.

        Raises:
            TypeError, ValueError: an argument's dtype or shape does not fit, there are more tokens than max_position_embeddings (but
                with a rope_type "dynamic") or than the cache has room for, or tokens that are no words (on a GPU torch's assertion);
                the message names it.
            RuntimeError: a cache without torch.no_grad().
        """
        limit, held = self.config.longest_sequence, 0 if cache is None else cache.length
        arguments.check_integer("Model: tokens", tokens)
        if tokens.dim() != 2 or (limit is not None and held + tokens.shape[1] > limit):
            less = f", less the {held} tokens that the cache holds" if held else ""
            room = "" if limit is None else f" with S <= max_position_embeddings = {limit}{less}"
            raise ValueError(f"Model: tokens: expected shape (B, S){room}, got {tuple(tokens.shape)}")
        if positions is not None and positions.shape != tokens.shape:
            raise ValueError(f"Model: positions: expected shape (B, S) = {tuple(tokens.shape)}, got {tuple(positions.shape)}")
        if labels is not None and labels.shape != tokens.shape:
            raise ValueError(f"Model: labels: expected shape (B, S) = {tuple(tokens.shape)}, got {tuple(labels.shape)}")
        if not is_count(logits_to_keep, 0):
            raise ValueError(f"Model: logits_to_keep: expected an integer >= 0, got {logits_to_keep!r}")
        if longest is None and self.model.rotary.adaptive and (cache is None or positions is not None):
            if cache is not None:
                longest = cache.room
            else:
                longest = tokens.shape[1] if positions is None or not positions.numel() else positions.max() + 1
        S = tokens.shape[1]
        if labels is not None and cache is None:  # the last has no successor
            tokens, positions = tokens[:, :-1], None if positions is None else positions[:, :-1]
        x = self.model(tokens, positions, cache, longest)
        result = self.logits(x[:, -logits_to_keep:]) if labels is None else self.loss(x[:, : S - 1], labels[:, 1:], memory_budget)
        if cache is not None:
            cache.end(S)
        return result

    def new_cache(self, batch: int, length: int) -> Cache:
        """Room for the keys and values of `length` tokens in each of `batch` sequences.

        With a rope_type "dynamic" or "longrope" the frequencies are those for `length` positions from the first token on.

        Raises:
            ValueError: batch or length is no integer >= 0.
        """
        for name, number in ("batch", batch), ("length", length):
            arguments.check(is_count(number, 0), f"new_cache: {name}", "an integer >= 0", repr(number))
        weight = self.model.embed_tokens.weight
        shape = batch, length, self.config.num_key_value_heads, self.config.head_dim
        k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # the weight itself may be a shard of FSDP's
        cos, sin = self.model.rotary(torch.arange(length, device=weight.device), weight.dtype, length)
        return Cache(len(self.model.layers), k, cos, sin)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu") -> Model:
        """Read a Hugging Face model folder: config.json and *.safetensors, and for save_pretrained generation_config.json.

        Args:
            dtype: floating point, or its name; None or "auto" keeps the stored one.

        Raises:
            fastprimer.checkpoint.CheckpointError: the folder or its weights are not there, cannot be read, or do not fit the config.
            fastprimer.config.ConfigError: the config asks for what is not supported; the message names the field.
            ValueError: dtype.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"there is no model folder {folder}")
        config = Config.from_json(folder / CONFIG_FILE)
        tensors = read_weights(folder, _floating(dtype), device)
        _drop_tied_head(config, tensors)
        with torch.device("meta"):
            model = cls(config)
        model.generation_config = read_json(folder / GENERATION_FILE)
        expected = model.state_dict()
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in tensors or name not in expected:
                raise CheckpointError(f"{folder}: the weights {'lack' if name in expected else 'have an unknown tensor'} {name}")
            if tensors[name].shape != expected[name].shape:
                shapes = tuple(expected[name].shape), tuple(tensors[name].shape)
                raise CheckpointError(f"{folder}: {name}: expected shape {shapes[0]}, got {shapes[1]}")
        model.load_state_dict(tensors, assign=True)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that from_pretrained and Hugging Face's transformers read. Compiled layers are saved as what they compile.

        Raises:
            CheckpointError: the model has other weights than its config says (another layer stands in the place of one of its own),
                or shards of them; nothing is written.
        """
        tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in self.state_dict().items()}
        with torch.device("meta"):
            expected = type(self)(self.config).state_dict()
        for name in sorted(tensors.keys() ^ expected.keys()):
            has = "lacks" if name in expected else "has an unknown tensor"
            raise CheckpointError(f"{folder}: the model {has} {name}; nothing was saved")
        for name, tensor in tensors.items():
            if hasattr(tensor, "full_tensor"):  # a DTensor, whose module takes half a second to import
                raise CheckpointError(
                    f"{folder}: {name} is sharded; nothing was saved. Gather the weights with torch.distributed.checkpoint.state_dict."
                    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) and load them into a model of one process"
                )
            if tensor.shape != expected[name].shape:
                shapes = tuple(expected[name].shape), tuple(tensor.shape)
                raise CheckpointError(f"{folder}: {name} has shape {shapes[1]}, not its config's {shapes[0]}; nothing was saved")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder, tensors)
        write_atomically(folder / CONFIG_FILE, self.config.to_json().encode())
        if self.generation_config is not None:
            write_atomically(folder / GENERATION_FILE, (json.dumps(self.generation_config, indent=2) + "\n").encode())

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        _drop_tied_head(self.config, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _drop_tied_head(config: Config, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """transformers' models name a tied embedding twice. A head of its own stays, and is an unexpected tensor."""
    head, embedding = tensors.get(f"{prefix}lm_head.weight"), tensors.get(f"{prefix}model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None:
        if embedding is None or head is embedding or head.is_meta or (head.shape == embedding.shape and bool((head == embedding).all())):
            del tensors[f"{prefix}lm_head.weight"]


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"Model: dtype: expected a floating-point dtype, its name, 'auto' or None, got {dtype!r}")
    return found
