"""Words in, words out: the vocabulary, decoding with or without a cache, and `fastprimer generate`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprimer.backends import BackendError
from fastprimer.checkpoint import CheckpointError, write_atomically
from fastprimer.config import Config, ConfigError, is_count, is_number
from fastprimer.decoding import NextToken
from fastprimer.options import natural, positive, temperature

VOCABULARY_FILE = "vocabulary.json"
GRAPH_FROM = 16
"""New tokens for which capturing a CUDA graph, some calls' work, pays."""
LEAST_TEMPERATURE = 1e-300
"""Of a division: 1 / 1e-310 is infinite, and devices divide by multiplying. Long before, only the most probable token is left."""


class PromptError(ValueError):
    """A prompt that the model cannot read."""


class LogitsError(ArithmeticError):
    """The logits of a model are NaN."""


class Vocabulary:
    """Whole words as tokens; the first word ends an answer."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.index = {word: token for token, word in enumerate(self.words)}
        self.end = 0

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        words = text.lower().replace("-", " ").split()
        unknown = [word for word in words if word not in self.index]
        if unknown:
            raise PromptError(f"unknown word {unknown[0]!r}; the words of this model are: {' '.join(self.words[1:])}")
        return [self.index[word] for word in words]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self.words[token] for token in tokens)

    def save(self, folder: Path) -> None:
        write_atomically(folder / VOCABULARY_FILE, (json.dumps(self.words, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        path = folder / VOCABULARY_FILE
        try:
            words = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"cannot read the vocabulary {path}: {error}") from error
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
            raise CheckpointError(f"{path}: expected a list of different words")
        return cls(words)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    end: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[float]]:
    """Continue every row of tokens, int (B, S), until `end`, or one of several such tokens, or max_new_tokens.

    A temperature of 0 takes the most probable token, else tokens are drawn from softmax(logits / temperature). A model that
    offers new_cache(B, T), as fastprimer.Model does, reads each token once, on a GPU from GRAPH_FROM new tokens on by a CUDA graph;
    any other, which takes (B, S) and returns logits (B, S, V), reads the whole sequence at each step. Rotary frequencies that depend on
    the length (rope_type "dynamic", "longrope") are from the start those for S + max_new_tokens positions.

    Returns:
        per row, the new tokens up to the first `end`, and the probability that the model gave to them (and to `end`, if it came).

    Raises:
        TypeError: tokens is not a tensor.
        ValueError: tokens is not of shape (B, S) with S >= 1; max_new_tokens is not an integer >= 0; temperature is not a finite number
            >= 0; end is not a token; S + max_new_tokens is more than the model's max_position_embeddings.
        LogitsError: the logits of a row that has not ended are NaN, as those of a model whose training has diverged.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"generate: tokens: expected a tensor (B, S), got {type(tokens).__name__}")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"generate: tokens: expected shape (B, S) with S >= 1, got {tuple(tokens.shape)}")
    if not is_count(max_new_tokens, 0):
        raise ValueError(f"generate: max_new_tokens: expected an integer >= 0, got {max_new_tokens!r}")
    if not is_number(temperature) or temperature < 0:
        raise ValueError(f"generate: temperature: expected a number >= 0, got {temperature!r}")
    batch, length = tokens.shape
    config = getattr(model, "config", None)
    config = config if isinstance(config, Config) else None
    limit = None if config is None else config.longest_sequence
    ends = _ends(end, math.inf if config is None else config.vocab_size)
    if limit is not None and length + max_new_tokens > limit:
        expected = f"at most max_position_embeddings = {limit} tokens, the {length} of the prompt included"
        raise ValueError(f"generate: max_new_tokens: expected {expected}, got {max_new_tokens}")
    cache = model.new_cache(batch, length + max_new_tokens) if hasattr(model, "new_cache") else None
    one_more = None
    log_probability = torch.zeros(batch, dtype=torch.float64, device=tokens.device)
    running = torch.ones(batch, dtype=torch.bool, device=tokens.device)
    last = torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)
    unread = tokens
    options = {"longest": length + max_new_tokens} if config is not None and config.rope.adaptive else {}
    for step in range(max_new_tokens):
        if cache is None:
            logits = model(tokens, **options)[:, -1]
        elif step == 0 or max_new_tokens < GRAPH_FROM:
            logits = model(unread, cache=cache, logits_to_keep=1)[:, -1]
        else:
            one_more = one_more or NextToken(model, cache)
            logits = one_more(unread)
        log_p = logits.double().log_softmax(-1)
        if temperature == 0:
            chosen = log_p.argmax(-1)
        else:
            below = log_p - log_p.amax(-1, keepdim=True)  # the largest stays 0 at any temperature, where -inf / -inf would be no number
            p = (below / max(temperature, LEAST_TEMPERATURE)).softmax(-1).nan_to_num(1.0)  # to draw by NaN would end a GPU's context
            chosen = torch.multinomial(p, 1, generator=generator)[:, 0]
        log_probability += torch.where(running, log_p.gather(-1, chosen[:, None])[:, 0], 0.0)
        unread = chosen[:, None]
        tokens = torch.cat((tokens, unread), dim=1)
        running &= (chosen[:, None] != last).all(1)
        # A row with a logit that is NaN has no most probable token. Both at once: a GPU is waited for only here.
        failed, going_on = torch.stack((log_probability.isnan().any(), running.any())).tolist()
        if failed:
            raise LogitsError("the logits of the model are NaN: its weights are not finite, or too large")
        if not going_on:
            break
    return [_until(row, ends) for row in tokens[:, length:].tolist()], log_probability.exp().tolist()


def _ends(end: int | Sequence[int] | None, vocab_size: float) -> tuple[int, ...]:
    ends = () if end is None else tuple(end) if isinstance(end, (list, tuple)) else (end,)
    if not all(is_count(token, 0) and token < vocab_size for token in ends):
        raise ValueError(f"generate: end: expected a token of the vocabulary, several, or None, got {end!r}")
    return ends


def _until(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def answer(model: nn.Module, vocabulary: Vocabulary, prompt: str, max_new_tokens: int = 5, **options) -> tuple[str, float]:
    """The model's answer to a prompt in words, and its probability."""
    encoded = vocabulary.encode(prompt)
    if not encoded:
        raise PromptError("the prompt is empty")
    longest = model.config.longest_sequence
    if longest is not None and len(encoded) + max_new_tokens > longest:
        raise PromptError(f"the model reads {longest} words at most, prompt and answer together")
    device = next(model.parameters()).device
    rows, probabilities = generate(model, torch.tensor([encoded], device=device), max_new_tokens, end=vocabulary.end, **options)
    return vocabulary.decode(rows[0]), probabilities[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="words, in quotes")
    parser.add_argument("--model", required=True, metavar="DIR", help="the folder that `fastprimer train --out DIR` has written")
    parser.add_argument("--max-new-tokens", type=positive, default=5, metavar="N", help="stop after this many words (default: 5)")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="0 (default): the most probable; 1: draw")
    parser.add_argument("--seed", type=natural, default=0, help="of the draw (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: prompt, answer, probability")


def run(args: argparse.Namespace) -> int:
    from fastprimer.model import Model

    try:
        folder = Path(args.model)
        vocabulary = Vocabulary.load(folder)
        vocabulary.encode(args.prompt)
        model = Model.from_pretrained(folder)
        if model.config.vocab_size != len(vocabulary):
            raise CheckpointError(f"{folder}: {VOCABULARY_FILE} has {len(vocabulary)} words, the model {model.config.vocab_size}")
        rng = torch.Generator().manual_seed(args.seed)
        text, probability = answer(model, vocabulary, args.prompt, args.max_new_tokens, temperature=args.temperature, generator=rng)
    except (ConfigError, CheckpointError, PromptError, LogitsError, BackendError) as error:
        print(f"fastprimer generate: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"prompt": args.prompt, "answer": text, "probability": probability}))
    else:
        print(f"{args.prompt} -> {text}   (probability {probability:.1%})")
    return 0
