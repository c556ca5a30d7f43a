"""The calculator: its words, its split, its batches and its measure of success."""

import pytest
import torch

from fastprimer import calculator, reference, train
from fastprimer.calculator import Calculator, Example, number_words
from fastprimer.checkpoint import CheckpointError
from fastprimer.generate import PromptError, Vocabulary


@pytest.fixture(scope="module")
def task():
    return Calculator(seed=0)


def value(words):
    """A number read from its words, by other rules than number_words writes it."""
    sign, total = 1, 0
    for word in words:
        if word == "negative":
            sign = -1
        elif word == "hundred":
            total *= 100
        elif word in calculator.TENS:
            total += 10 * (calculator.TENS.index(word) + 2)
        else:
            total += calculator.ONES.index(word)
    return sign * total


def test_number_words():
    written = {n: number_words(n) for n in range(-999, 1000)}
    assert all(value(words) == n for n, words in written.items())
    assert len({tuple(words) for words in written.values()}) == len(written)
    assert " ".join(written[198]) == "one hundred ninety eight"
    assert " ".join(written[-40]) == "negative forty"
    assert " ".join(written[100]) == "one hundred" and " ".join(written[0]) == "zero" and " ".join(written[13]) == "thirteen"


def test_an_example_in_words():
    example = Example(7, "minus", 12)
    assert (example.prompt, example.answer) == ("seven minus twelve equals", "negative five")


def test_the_vocabulary_reads_back_what_it_writes(task, tmp_path):
    for example in task.train["minus"][:200] + task.held_out["times"]:
        assert task.vocabulary.decode(task.vocabulary.encode(example.prompt)) == example.prompt
    assert task.vocabulary.encode("Forty-Two") == task.vocabulary.encode("forty two")
    with pytest.raises(PromptError, match="unknown word 'tree'; the words of this model are: zero one .* equals$"):
        task.vocabulary.encode("two plus tree equals")
    task.vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path).words == task.vocabulary.words
    for broken in ('["a", 1]', '["a", "b", "a"]'):
        (tmp_path / "vocabulary.json").write_text(broken)
        with pytest.raises(CheckpointError, match="expected a list of different words"):
            Vocabulary.load(tmp_path)


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_a_pair_is_wholly_on_one_side(seed):
    task = Calculator(seed)
    sides = {}
    for name, side in (("train", task.train), ("held out", task.held_out)):
        for operation, examples in side.items():
            kind = "products" if operation == "times" else "sums and differences"
            for e in examples:
                sides.setdefault((kind, frozenset((e.a, e.b))), set()).add(name)
    assert all(len(side) == 1 for side in sides.values())
    sizes = {operation: (len(task.train[operation]), len(task.held_out[operation])) for operation in task.train}
    assert sizes == {"plus": (6500, 3500), "minus": (6500, 3500), "times": (135, 34)}
    for operation, limit in (("plus", 100), ("minus", 100), ("times", 13)):
        pairs = {(e.a, e.b) for e in task.train[operation] + task.held_out[operation]}
        assert pairs == {(a, b) for a in range(limit) for b in range(limit)}


def test_splits_differ_by_seed(task):
    assert task.train["plus"] == Calculator(0).train["plus"] != Calculator(1).train["plus"]


def test_the_loss_counts_the_answer_and_its_end(task):
    e = Example(99, "plus", 99)
    tokens, labels = task._tensors([e, Example(2, "plus", 3)])
    assert tokens.shape == (2, calculator.LENGTH)
    assert task.vocabulary.decode(tokens[0].tolist()) == f"{e.prompt} {e.answer} <end>"
    assert task.vocabulary.decode(labels[0][labels[0] != -100].tolist()) == "one hundred ninety eight <end>"
    assert task.vocabulary.decode(labels[1][labels[1] != -100].tolist()) == "five <end>"
    assert train._count_inputs(labels) == 10 + 5


def test_a_batch_is_a_function_of_seed_and_step(task):
    first, second = task.batch(200, 128), Calculator(0).batch(200, 128)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], Calculator(1).batch(200, 128)[0])
    steps = len(task.tokens) // 128
    epoch = torch.cat([task.batch(step, 128)[0] for step in range(steps)])
    whole = {tuple(row) for row in task.tokens.tolist()}
    assert len(epoch) == 128 * steps and {tuple(row) for row in epoch.tolist()} <= whole
    assert len({tuple(row) for row in epoch.tolist()}) > 0.95 * len(whole)


def test_exact_match_is_the_teacher_forced_one(task):
    """Greedy decoding is right exactly where every word of the answer is the most probable after the right ones before it."""
    trainer = train.Trainer(task, reference.Model(task.config), train.Settings(steps=60))
    for _ in range(60):
        trainer.train_step()
    model = trainer.average.module
    examples = task.train["times"]
    tokens, labels = task._tensors(examples)
    with torch.no_grad():
        best = model(tokens)[:, :-1].argmax(-1)
    right = ((best == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1)
    assert 0 < right.double().mean() < 1
    assert task.exact_match(model, examples) == right.double().mean().item()


def test_samples_say_whether_they_were_trained(task):
    samples = task.samples()
    assert samples[0][0] == "two plus three equals" and {trained for _, trained in samples} == {True, False}
    for prompt, trained in samples:
        assert trained == any(prompt == e.prompt for examples in task.train.values() for e in examples)
