"""Arithmetic in English words: the smallest task on which a language model visibly learns something.

    two plus three equals -> five
    seven minus twelve equals -> negative five
    ninety nine plus ninety nine equals -> one hundred ninety eight
    six times seven equals -> forty two

A word is a token. Sums and differences have operands 0..99, products 0..12. An unordered pair {a, b} belongs to one side only, so
that the model cannot answer "three plus two" from having seen "two plus three", nor "three minus two" from "two minus three".
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprimer.config import Config
from fastprimer.generate import Vocabulary, generate

ONES = "zero one two three four five six seven eight nine".split()
ONES += "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
OPERATIONS = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}
WORDS = ["<end>", *ONES, *TENS, "hundred", "negative", *OPERATIONS, "equals"]

MAX_ANSWER = 5
"""one hundred ninety eight <end>"""
LENGTH = 6 + MAX_ANSWER
"""The longest example; a prompt has at most two words, operation, two words, equals."""

TRAINED = 6500
"""Sums to train on, and as many differences, out of 10,000 each."""
TRAINED_PRODUCTS = 135
"""Products to train on, out of 169."""
PRODUCT_COPIES = 3
"""How often an epoch shows each product: a table can only be learned by heart."""


def number_words(n: int) -> list[str]:
    """-999 .. 999 in words: 198 is one hundred ninety eight."""
    if n < 0:
        return ["negative", *number_words(-n)]
    if n < 20:
        return [ONES[n]]
    if n < 100:
        return [TENS[n // 10 - 2]] + ([ONES[n % 10]] if n % 10 else [])
    return [ONES[n // 100], "hundred"] + (number_words(n % 100) if n % 100 else [])


@dataclass(frozen=True)
class Example:
    a: int
    operation: str
    b: int

    @property
    def prompt(self) -> str:
        return " ".join([*number_words(self.a), self.operation, *number_words(self.b), "equals"])

    @property
    def answer(self) -> str:
        return " ".join(number_words(OPERATIONS[self.operation](self.a, self.b)))


def split_pairs(limit: int, count: int, rng: random.Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All (a, b) with 0 <= a, b < limit in two lists, the first of `count` pairs; (a, b) and (b, a) are in the same one."""
    unordered = [(a, b) for a in range(limit) for b in range(a, limit)]
    rng.shuffle(unordered)
    trained, held_out = [], []
    for a, b in unordered:
        both = [(a, b)] if a == b else [(a, b), (b, a)]
        (trained if len(trained) + len(both) <= count else held_out).extend(both)
    return trained, held_out


class Calculator:
    """The task: examples, their batches, samples to show, and the measure of success."""

    name = "calculator"
    config = Config.preset("calculator")

    def __init__(self, seed: int):
        rng = random.Random(seed)
        pairs, other_pairs = split_pairs(100, TRAINED, rng)
        factors, other_factors = split_pairs(13, TRAINED_PRODUCTS, rng)
        self.vocabulary = Vocabulary(WORDS)
        self.train = {name: [Example(a, name, b) for a, b in pairs] for name in ("plus", "minus")}
        self.train["times"] = [Example(a, "times", b) for a, b in factors]
        self.held_out = {name: [Example(a, name, b) for a, b in other_pairs] for name in ("plus", "minus")}
        self.held_out["times"] = [Example(a, "times", b) for a, b in other_factors]
        self.seed = seed
        examples = [*self.train["plus"], *self.train["minus"], *self.train["times"] * PRODUCT_COPIES]
        self.tokens, self.labels = self._tensors(examples)
        self._epoch, self._order = -1, torch.empty(0)

    def _tensors(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Prompt, answer and <end> as tokens (n, LENGTH), and labels that count the answer and its end only."""
        tokens = torch.full((len(examples), LENGTH), self.vocabulary.end)
        labels = torch.full((len(examples), LENGTH), -100)
        for row, example in enumerate(examples):
            prompt, answer = self.vocabulary.encode(example.prompt), self.vocabulary.encode(example.answer)
            full = torch.tensor([*prompt, *answer, self.vocabulary.end])
            tokens[row, : len(full)] = full
            labels[row, len(prompt) : len(full)] = full[len(prompt) :]
        return tokens, labels

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The tokens and labels of a step: a function of the seed and the step alone, so that a resumed run goes on unchanged."""
        per_epoch = max(1, len(self.tokens) // size)
        epoch, position = divmod(step, per_epoch)
        if epoch != self._epoch:
            rng = torch.Generator().manual_seed((self.seed << 32) + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.tokens), generator=rng)
        rows = self._order[position * size : (position + 1) * size]
        return self.tokens[rows], self.labels[rows]

    def samples(self) -> list[tuple[str, bool]]:
        """Prompts to show, and whether the model is trained on them."""
        examples = (
            Example(2, "plus", 3),
            self.held_out["plus"][0],
            Example(7, "minus", 12),
            self.held_out["minus"][0],
            self.train["times"][0],
        )
        return [(e.prompt, e in self.train[e.operation]) for e in examples]

    def evaluate(self, model: nn.Module) -> dict:
        """Exact match by greedy decoding: unseen sums and differences; of the products those trained (recall) and those not."""
        return {
            "heldout_exact_match": {
                "plus": self.exact_match(model, self.held_out["plus"]),
                "minus": self.exact_match(model, self.held_out["minus"]),
                "times": self.exact_match(model, self.train["times"]),
            },
            "times_unseen": self.exact_match(model, self.held_out["times"]),
        }

    def describe(self, measured: dict) -> list[str]:
        """The result of evaluate, for people."""
        share = measured["heldout_exact_match"]
        return [
            f"plus   {share['plus']:7.2%} of {len(self.held_out['plus']):,} unseen sums right",
            f"minus  {share['minus']:7.2%} of {len(self.held_out['minus']):,} unseen differences right",
            f"times  {share['times']:7.2%} of {len(self.train['times'])} trained products recalled "
            f"({measured['times_unseen']:.0%} of {len(self.held_out['times'])} unseen ones)",
        ]

    def exact_match(self, model: nn.Module, examples: list[Example]) -> float:
        """The share of the examples whose whole answer, <end> included, is right."""
        by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
        for example in examples:
            prompt, answer = self.vocabulary.encode(example.prompt), self.vocabulary.encode(example.answer)
            by_length.setdefault(len(prompt), []).append((prompt, answer))
        right = 0
        for group in by_length.values():
            prompts = torch.tensor([prompt for prompt, _ in group], device=next(model.parameters()).device)
            answers, _ = generate(model, prompts, MAX_ANSWER, end=self.vocabulary.end)
            right += sum(given == answer for given, (_, answer) in zip(answers, group, strict=True))
        return right / len(examples)


class MixtureCalculator(Calculator):
    """The same with four experts of half the size in place of each feed-forward layer, two of them for every word."""

    name = "calculator-moe"
    config = Calculator.config.replace(intermediate_size=88, num_local_experts=4, num_experts_per_tok=2)
