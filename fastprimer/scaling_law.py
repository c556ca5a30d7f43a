"""How the loss of a language model falls with its weights and its training tokens, and how to divide a budget between them.

N weights, D tokens, C = 6 N D floating-point operations of training (2 forward, 4 backward, for every weight and token).

    L(N, D) = E + A / N^α + B / D^β            Hoffmann et al. (2022), section 3.3, equation 2

E is the entropy of the text itself, A / N^α what a model of N weights cannot express, B / D^β what it has not learned from D tokens.

The best N for a budget. With D = C / (6 N), dL/dN = 0 says α A / N^α = β B / D^β: a percent more weights and a percent more tokens gain
the same. So

    N = G (C / 6)^a,    D = (C / 6)^b / G,    G = (α A / (β B))^(1 / (α + β)),    a = β / (α + β),    b = α / (α + β)

Fitting. log L is fitted by the Huber loss (δ = 10^-3) of log-sum-exp(log A - α log N, log B - β log D, log E), so that a few bad runs do
not decide (ibid., equation 3), with L-BFGS. Where it begins: for given exponents L is linear in E, A, B, and the best least-squares fit of
a grid of exponents is a good first guess, for which the paper runs L-BFGS from 4500 places. Intervals: the fit's own residuals, drawn
anew and fitted again.

Sources: Hoffmann et al. (2022), "Training compute-optimal large language models" (Chinchilla); Besiroglu et al. (2024), "Chinchilla
scaling: a replication attempt", which corrects its third fit, and has the digits of it that the paper rounds away; Kaplan et al. (2020),
"Scaling laws for neural language models", appendix A, whose N are weights without embeddings, and whose operations are those of small
batches: 6 N D is about twice as many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HUBER = 1e-3
FEWEST = 6
"""Runs for five unknowns."""
PETAFLOP_DAY = 1e15 * 86400
LEAST_GAIN = 1e-4
"""Of a loss, from the fewest weights or tokens to the most: less is noise, whose best division says nothing."""
LARGEST_LOG = 700.0
"""What a steep fit of noise may exceed."""
STEEPEST = 3.0
"""An exponent; those of language models are below 1."""
GRID = torch.linspace(0.05, 1.5, 30, dtype=torch.float64)
"""First guesses of an exponent."""


class FitError(ValueError):
    """Runs to which no law can be fitted."""


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, nats a token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        return self.E + self.of_parameters(N) + self.of_tokens(D)

    def of_parameters(self, N: float) -> float:
        return self.A * N**-self.alpha

    def of_tokens(self, D: float) -> float:
        return self.B * D**-self.beta

    @property
    def a(self) -> float:
        """The best N grows as C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def _G(self) -> float:
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def for_flops(self, C: float) -> tuple[float, float]:
        """(N, D) of the least loss for C operations."""
        return self._G * (C / 6) ** self.a, (C / 6) ** (1 - self.a) / self._G

    def for_parameters(self, N: float) -> tuple[float, float]:
        """(N, D): the budget whose best model has N weights."""
        return self.for_flops(6 * (N / self._G) ** (1 / self.a))

    def for_tokens(self, D: float) -> tuple[float, float]:
        return self.for_flops(6 * (D * self._G) ** (1 / (1 - self.a)))


@dataclass(frozen=True)
class Powers:
    """N = n C^a, D = d C^b, for C in units of `unit` operations; without a loss."""

    n: float
    a: float
    d: float
    b: float
    unit: float

    def for_flops(self, C: float) -> tuple[float, float]:
        return self.n * (C / self.unit) ** self.a, self.d * (C / self.unit) ** self.b

    def for_parameters(self, N: float) -> tuple[float, float]:
        return self.for_flops(self.unit * (N / self.n) ** (1 / self.a))

    def for_tokens(self, D: float) -> tuple[float, float]:
        return self.for_flops(self.unit * (D / self.d) ** (1 / self.b))


PUBLISHED = {
    "Hoffmann 2022, 20 a weight": Powers((1 / 120) ** 0.5, 0.5, 20 * (1 / 120) ** 0.5, 0.5, 1.0),
    "Hoffmann 2022, third fit": Law(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849),
    "Besiroglu 2024": Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
    "Kaplan 2020": Powers(1.3e9, 0.73, 2e10, 0.27, PETAFLOP_DAY),
}


def fit(N: list[float], D: list[float], loss: list[float]) -> Law:
    """The law of runs with N weights, D tokens and a final loss each.

    Raises:
        FitError: fewer than 6 runs, or fewer than 3 different N or D; losses that do not fall with both, or that fall by steps.
    """
    if len(N) < FEWEST or len(set(N)) < 3 or len(set(D)) < 3:
        raise FitError(f"expected at least {FEWEST} runs, of 3 sizes and 3 numbers of tokens, got {len(N)} runs")
    law = _fit(*(torch.tensor(values, dtype=torch.float64).log() for values in (N, D, loss)))
    gains = {name: term(min(x)) - term(max(x)) for name, x, term in (("N", N, law.of_parameters), ("D", D, law.of_tokens))}
    for name, gain in gains.items():
        if not gain > LEAST_GAIN * min(loss):
            raise FitError(f"expected losses that fall with {name}, got runs that fit a gain of {gain:.2g}")
    if not max(law.alpha, law.beta) <= STEEPEST:
        raise FitError(f"expected exponents up to {STEEPEST}, got runs that fit alpha = {law.alpha:.2g} and beta = {law.beta:.2g}: noise")
    return law


def intervals(
    N: list[float], D: list[float], loss: list[float], law: Law, draws: int = 100, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95% intervals of alpha, beta and a: quantiles of fits to the law's losses with its residuals, drawn anew."""
    n, d, log_loss = (torch.tensor(values, dtype=torch.float64).log() for values in (N, D, loss))
    fitted = torch.tensor([law.loss(*point) for point in zip(N, D, strict=True)], dtype=torch.float64).log()
    residuals = (log_loss - fitted) * (len(N) / max(1, len(N) - 5)) ** 0.5  # five numbers were fitted to them
    generator = torch.Generator().manual_seed(seed)
    laws = [_fit(n, d, fitted + residuals[torch.randint(len(N), (len(N),), generator=generator)]) for _ in range(draws)]
    found = {}
    for name in ("alpha", "beta", "a"):
        ordered = sorted(getattr(one, name) for one in laws)
        found[name] = ordered[int(0.025 * draws)], ordered[math.ceil(0.975 * draws) - 1]
    return found


def _fit(n: Tensor, d: Tensor, log_loss: Tensor) -> Law:
    """All three are logarithms."""
    unknowns = torch.tensor(_first_guess(n, d, log_loss.exp()), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([unknowns], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        e, log_a, log_b, alpha, beta = unknowns
        terms = torch.stack((log_a - alpha * n, log_b - beta * d, e.expand_as(n)))
        total = torch.nn.functional.huber_loss(terms.logsumexp(0), log_loss, delta=HUBER, reduction="sum") / HUBER**2
        total.backward()
        return total

    optimizer.step(objective)
    e, log_a, log_b, alpha, beta = unknowns.tolist()
    return Law(*(math.exp(min(x, LARGEST_LOG)) for x in (e, log_a, log_b)), alpha, beta)


def _first_guess(n: Tensor, d: Tensor, loss: Tensor) -> list[float]:
    """log E, log A, log B, alpha, beta of the best least-squares fit with exponents of the grid and positive E, A, B."""
    alpha, beta = (values.flatten() for values in torch.meshgrid(GRID, GRID, indexing="ij"))
    center = n.mean(), d.mean()  # powers near 1: A and B of the logarithms' center
    columns = torch.stack((torch.ones(len(alpha), len(n), dtype=n.dtype), _powers(alpha, n - center[0]), _powers(beta, d - center[1])), -1)
    solutions = torch.linalg.lstsq(columns, loss.expand(len(alpha), -1)[..., None]).solution
    errors = (columns @ solutions - loss[:, None]).square().sum((1, 2))
    errors = torch.where((solutions > 0).all((1, 2)), errors, math.inf)
    best = int(errors.argmin())
    if errors[best] == math.inf:  # rising losses, say: begin with equal parts
        level = math.log(float(loss.mean()) / 3)
        return [level, level + 0.3 * float(center[0]), level + 0.3 * float(center[1]), 0.3, 0.3]
    E, A, B = solutions[best, :, 0].log().tolist()
    return [E, A + float(alpha[best] * center[0]), B + float(beta[best] * center[1]), float(alpha[best]), float(beta[best])]


def _powers(exponents: Tensor, logarithms: Tensor) -> Tensor:
    return (-exponents[:, None] * logarithms).exp()
