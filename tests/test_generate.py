"""Decoding: its end, its draws, its temperature, and how far it goes. That a cache changes nothing: tests/test_model.py."""

import dataclasses

import pytest
import torch

from conftest import SMALL
from fastprimer import cli, reference
from fastprimer.calculator import Calculator
from fastprimer.generate import LogitsError, generate
from fastprimer.model import Model

TOKENS = torch.randint(50, (3, 14), generator=torch.Generator().manual_seed(0))


def models(config=SMALL):
    torch.manual_seed(0)
    slow = reference.Model(config)
    fast = Model(config)
    fast.load_state_dict(slow.state_dict())
    return slow, fast


def test_generate_ends_and_draws():
    slow, fast = models()
    rows, _ = generate(slow, TOKENS[:1], 6)
    end = rows[0][2]
    short, probability = generate(slow, TOKENS[:1], 6, end=end)
    assert short[0] == rows[0][: rows[0].index(end)] and 0 < probability[0] < 1
    absent = next(token for token in range(slow.config.vocab_size) if token not in rows[0])
    for several in ([end], (end, absent), [absent, end]):
        assert generate(slow, TOKENS[:1], 6, end=several) == (short, probability)
    assert generate(slow, TOKENS[:1], 6, end=[end, rows[0][0]])[0] == [[]]
    assert generate(slow, TOKENS[:1], 6, end=[])[0] == rows
    for wrong in (-1, True, "2", 1.0, [2, None], 10**6, torch.tensor(2)):
        with pytest.raises(ValueError, match="generate: end: expected a token of the vocabulary, several, or None, got"):
            generate(fast, TOKENS, 6, end=wrong)
    draws = [generate(fast, TOKENS, 6, temperature=2.0, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("temperature", (1e-310, 5e-324, 1e-30, 1e-5))
def test_a_tiny_temperature_takes_the_most_probable(temperature):
    _, fast = models()
    generator = torch.Generator().manual_seed(0)
    assert generate(fast, TOKENS, 6, temperature=temperature, generator=generator) == generate(fast, TOKENS, 6)


@pytest.mark.parametrize("temperature", (-1, float("nan"), float("inf"), "1", True))
def test_generate_refuses_what_is_no_temperature(temperature):
    with pytest.raises(ValueError, match=f"generate: temperature: expected a number >= 0, got {temperature!r}"):
        generate(models()[1], TOKENS, 6, temperature=temperature)


def test_generate_refuses_an_empty_prompt_and_less_than_no_tokens():
    model = models()[1]
    with pytest.raises(ValueError, match=r"generate: tokens: expected shape .B, S. with S >= 1, got .1, 0."):
        generate(model, TOKENS[:1, :0], 3)
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match=f"generate: max_new_tokens: expected an integer >= 0, got {wrong!r}"):
            generate(model, TOKENS, wrong)
    assert generate(model, TOKENS, 0) == ([[]] * 3, [1.0] * 3)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("kind", (0, 1))
def test_generate_refuses_a_model_that_has_diverged(temperature, kind):
    model = models()[kind]
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(LogitsError, match="the logits of the model are NaN"):
        generate(model, TOKENS, 2, temperature=temperature)


def test_what_follows_the_end_of_a_row_does_not_matter():
    def model(tokens):  # it gives 3, then 0, the end, then NaN to the first row
        logits = torch.full((*tokens.shape, 5), -1e9)
        logits[:, -1, 3] = 0
        logits[0, -1] = torch.where(torch.arange(5) == 0, 0.0, -1e9) if tokens.shape[1] == 2 else logits[0, -1]
        logits[0, -1] = torch.nan if tokens.shape[1] > 2 else logits[0, -1]
        return logits

    for temperature in (0.0, 1.0):
        rows, probabilities = generate(model, torch.zeros(2, 1, dtype=torch.int64), 4, end=0, temperature=temperature)
        assert rows == [[3], [3, 3, 3, 3]] and probabilities == [1.0, 1.0]


@pytest.mark.parametrize("weight", (float("nan"), 3e38))
def test_a_folder_of_a_diverged_model_gives_no_answer(tmp_path, capsys, weight):
    task = Calculator(0)
    model = Model(task.config)
    model.model.norm.weight.data.fill_(weight)
    model.save_pretrained(tmp_path)
    task.vocabulary.save(tmp_path)
    for temperature in "01":
        assert cli.main(["generate", "--model", str(tmp_path), "--json", "--temperature", temperature, "two plus three equals"]) == 2
        said = capsys.readouterr()
        assert (
            said.out == ""
            and said.err == "fastprimer generate: error: the logits of the model are NaN: its weights are not finite, or too large\n"
        )


def test_a_cache_does_not_go_beyond_the_positions():
    slow, fast = models(dataclasses.replace(SMALL, max_position_embeddings=16))
    with torch.no_grad():
        cache = fast.new_cache(3, 40)
        fast(TOKENS, cache=cache)
        fast(TOKENS[:, :1], cache=cache)
        with pytest.raises(ValueError, match="S <= max_position_embeddings = 16, less the 15 tokens that the cache holds, got .3, 2"):
            fast(TOKENS[:, :2], cache=cache)
        fast(TOKENS[:, :1], cache=cache)
    for model in (slow, fast):
        assert len(generate(model, TOKENS, 2)[0][0]) == 2
        with pytest.raises(
            ValueError, match="generate: max_new_tokens: expected at most .* = 16 tokens, the 14 of the prompt included, got 3"
        ):
            generate(model, TOKENS, 3)
