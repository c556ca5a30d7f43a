"""The loss curves of the fast model and of the reference coincide to rounding, for a small vocabulary and a large one; a loss's budget."""

import dataclasses

import pytest
import torch

from fastprimer import layers, ops, reference, train
from fastprimer.calculator import Calculator, MixtureCalculator
from fastprimer.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(name, steps, task, **settings):
    trainer = train.Trainer(task, train.MODELS[name](task.config), train.Settings(steps=steps, **settings))
    for _ in range(steps):
        trainer.train_step()
    return torch.tensor(trainer.losses, dtype=torch.float64)


class LargeVocabulary:
    """A word decides the next one but for one time in four; 32 thousand words, the frequent ones far more frequent."""

    name = "large vocabulary"
    config = dataclasses.replace(Calculator.config, vocab_size=32_000)

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.follower = torch.randperm(self.config.vocab_size, generator=rng)
        self.frequency = 1 / torch.arange(1.0, self.config.vocab_size + 1)

    def batch(self, step, size):
        rng = torch.Generator().manual_seed(step)
        words = torch.multinomial(self.frequency, size * 12, replacement=True, generator=rng).view(size, 12)
        for i in range(1, words.shape[1]):
            follows = torch.rand(size, generator=rng) < 0.75
            words[:, i] = torch.where(follows, self.follower[words[:, i - 1]], words[:, i])
        return words, words


TASKS = {"calculator": lambda: Calculator(0), "calculator-moe": lambda: MixtureCalculator(0), "large vocabulary": LargeVocabulary}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_loss_curves_of_reference_and_fast_model_coincide(name, monkeypatch):
    """Over 50 steps the curves differ by no more than rounding makes them differ: three times what noise of one unit in the
    last place of the initial weights does to the reference's own curve, plus a floor of eight units. A wrong eps does not pass."""
    task, size = TASKS[name](), 16 if name == "large vocabulary" else 128
    slow, fast = (losses(model, 50, task, batch_size=size) for model in ("reference", "fast"))
    trainer = train.Trainer(task, reference.Model(task.config), train.Settings(steps=50, batch_size=size))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps * (2 * torch.randint(2, p.shape, generator=noise) - 1))
    for _ in range(50):
        trainer.train_step()
    disturbed = torch.tensor(trainer.losses, dtype=torch.float64)
    budget = 3 * (disturbed - slow).abs().max() + 8 * torch.finfo(torch.float32).eps * slow.max()
    assert (fast - slow).abs().max() <= budget
    assert fast[-1] < 0.9 * fast[0]

    monkeypatch.setattr(layers.RMSNorm, "forward", lambda self, x, residual=None: ops.rms_norm(x, self.weight, 1e-4, residual=residual))
    assert (losses("fast", 50, task, batch_size=size) - slow).abs().max() > budget


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_keeps_as_many_logits_as_it_is_allowed(tied):
    model = Model(dataclasses.replace(Calculator.config, vocab_size=1000, tie_word_embeddings=tied))
    tokens = torch.randint(1000, (2, 9))

    def kept_bytes(budget):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            model(tokens, tokens, memory_budget=budget)
        return sum(kept)

    assert kept_bytes(1 << 20) - kept_bytes(0) == 2 * 8 * 1000 * 4
    with pytest.raises(ValueError, match="memory_budget"):
        model(tokens, tokens, memory_budget=-1)
