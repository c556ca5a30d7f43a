"""Whole decoders: a training step, and the decoding of one more token, ours against the same model by others.

The contestants have the same weights. Ours is eager, and in cases named so under torch.compile; `eager` is fastprimer/reference.py,
the model in plain torch, and `compiled` is that under torch.compile; `transformers` is Hugging Face's architecture of the same config
with scaled_dot_product_attention (and grouped_mm for experts), which decodes with a DynamicCache, and `hf-compiled` the same under
torch.compile, with a StaticCache; `liger` is the former with Liger-Kernel's layers, on a GPU. The plain model has no cache and does not
decode. On a GPU our token is one CUDA graph of packed projections, and `hf-compiled` decodes with torch.compile's (mode "reduce-overhead").

A training step is the loss, its gradients, their norm clipped, and fused AdamW with a learning rate of 0: its full cost, but the weights,
and with them what every contestant computes, stay what they are in every round.

What a step must at least do: 2 operations per weight of a matrix product and token forward, 4 backward, and attention's products; every
weight read in both passes, its gradient written, and seven reads and writes of the optimizer; activations are not counted. One more token
reads every weight that it uses (of the experts, as many as its batch can choose), and the cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fastprimer import reference
from fastprimer.backends import use_backend
from fastprimer.benchmark.contest import SHORT, Settings, contest
from fastprimer.benchmark.rows import Row
from fastprimer.benchmark.timing import DECODING, TRAINING
from fastprimer.config import Config
from fastprimer.decoding import captured
from fastprimer.layers import pack_projections
from fastprimer.model import Model
from fastprimer.testing import FORWARD_FACTOR, GRADIENT_FACTOR, poisoned_empty, share_of_budget

MODEL = "model"
MODEL_PEERS = ("eager", "compiled", "transformers", "hf-compiled", "liger")
PROVEN_TOKENS = 256
"""Of the first sequence, in the proof against float64."""


@dataclass(frozen=True)
class ModelCase:
    """Training on `batch` sequences of `length` tokens; decoding of one more token for each of `streams` with `cached` tokens."""

    name: str
    config: Config
    batch: int
    length: int
    streams: int
    cached: int
    compiled: bool = False
    """Ours under torch.compile too: training alone."""

    def __str__(self) -> str:
        return f"{MODEL}-{self.name}"

    def tokens(self, rows: int, length: int, settings: Settings) -> Tensor:
        generator = torch.Generator().manual_seed(settings.seed)
        return torch.randint(self.config.vocab_size, (rows, length), generator=generator).to(settings.device)

    def inputs(self, measured: str, settings: Settings) -> Tensor:
        return self.tokens(*((self.batch, self.length) if measured == TRAINING else (self.streams, self.cached + 1)), settings)

    def work(self, measured: str, itemsize: int) -> tuple[int, int]:
        """(bytes, floating-point operations)"""
        c = self.config
        heads = c.num_hidden_layers * c.num_attention_heads * c.head_dim
        if measured == TRAINING:
            N, weights = self.batch * (self.length - 1), _matrix_weights(c, c.num_experts_per_tok)
            pairs = self.batch * (self.length - 1) * self.length // 2
            return 10 * itemsize * _weights(c), 6 * N * weights + 12 * pairs * heads
        read = _matrix_weights(c, min(c.num_local_experts, self.streams * c.num_experts_per_tok))
        cache = 2 * self.streams * self.cached * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        products = 2 * self.streams * _matrix_weights(c, c.num_experts_per_tok)
        return itemsize * (read + cache), products + 4 * self.streams * self.cached * heads


def _weights(c: Config) -> int:
    untied = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    return _matrix_weights(c, c.num_local_experts) + untied


def _matrix_weights(c: Config, experts: int) -> int:
    """Weights of all matrix products, the head's too, where a layer has this many experts."""
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    inner = 3 * c.hidden_size * c.intermediate_size * (experts if c.is_moe else 1)
    router = c.hidden_size * c.num_local_experts
    return c.num_hidden_layers * (attention + inner + router) + c.vocab_size * c.hidden_size


_CALCULATOR = ModelCase("calculator", Config.preset("calculator"), batch=128, length=11, streams=1, cached=10)
_CALCULATOR_COMPILED = replace(_CALCULATOR, name="calculator-compiled", compiled=True)
_SMALL = dict(vocab_size=32000, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
_LLAMA_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=True,
)  # fmt: skip
_MIXTRAL_8X160M = dict(
    vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
    max_position_embeddings=8192, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
MODEL_CASES = {
    "cpu": (
        _CALCULATOR,
        _CALCULATOR_COMPILED,
        ModelCase("dense", Config(intermediate_size=1408, **_SMALL), 4, 256, 1, 1024),
        ModelCase("moe", Config(intermediate_size=512, num_local_experts=8, **_SMALL), 4, 256, 1, 1024),
    ),
    "cuda": (
        _CALCULATOR,
        _CALCULATOR_COMPILED,
        ModelCase("llama-1b", Config(**_LLAMA_1B), 4, 2048, 32, 4096),
        ModelCase("llama-1b-alone", Config(**_LLAMA_1B), 1, 2048, 1, 4096),
        ModelCase("mixtral-8x160m", Config(**_MIXTRAL_8X160M), 4, 2048, 32, 4096),
    ),
}


def measure_model(case: ModelCase, dtype: torch.dtype, backend: str, passes: tuple[str, ...], settings: Settings) -> Iterator[Row]:
    """A row for each pass; without times where the model is beyond its error budget."""
    weights = weights_of(case, dtype, settings)
    with use_backend(backend):
        wrong = _proof(case, weights, dtype, backend, settings)
    for measured in passes:
        if case.compiled and measured == DECODING:
            continue
        row = Row(MODEL, case.name, str(dtype).removeprefix("torch."), measured, backend, wrong)
        if not wrong:
            torch.compiler.reset()
            row.bytes, row.flops = case.work(measured, dtype.itemsize)
            with use_backend(backend):
                _time(row, case, weights, settings)
        yield row


def weights_of(case: ModelCase, dtype: torch.dtype, settings: Settings) -> dict[str, Tensor]:
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        return Model(case.config).to(dtype).state_dict()


def our_call(case: ModelCase, measured: str, weights: dict[str, Tensor], tokens: Tensor) -> tuple[Callable, str]:
    """(a training step, or one more token; why that token is not one CUDA graph where it should be)"""
    prepare = _training_call if measured == TRAINING else _decoding_call
    call = prepare(lambda: _compiled(Model(case.config)) if case.compiled else Model(case.config), weights, tokens)
    return captured(call, tokens.device) if measured == DECODING and tokens.is_cuda else (call, "")


def _time(row: Row, case: ModelCase, weights: dict[str, Tensor], settings: Settings) -> None:
    tokens = case.inputs(row.measured, settings)
    ours, reason = our_call(case, row.measured, weights, tokens)
    row.left_out |= {"ours in a CUDA graph": reason} if reason else {}
    prepare = _training_call if row.measured == TRAINING else _decoding_call
    theirs = model_peers(case, settings.device, row.measured, settings.peers)
    makers = {name: functools.partial(prepare, make, weights, tokens) for name, make in theirs.items()}
    contest(row, ours, makers, settings, warm=row.flops < SHORT)


def model_peers(case: ModelCase, device: str, measured: str, wanted: list[str] | None = None) -> dict[str, Callable[[], nn.Module]]:
    """What makes each peer of a model, by name; `wanted`: only these."""
    makers: dict[str, Callable[[], nn.Module]] = {}
    if measured == TRAINING:
        makers |= {"eager": lambda: reference.Model(case.config), "compiled": lambda: _compiled(reference.Model(case.config))}
    if find_spec("transformers"):
        theirs = functools.partial(_Transformers, case.config)
        mode = "reduce-overhead" if measured == DECODING and device == "cuda" else "default"
        makers |= {"transformers": theirs, "hf-compiled": lambda: _compiled(theirs(), mode)}
        if device == "cuda" and find_spec("liger_kernel") and measured == TRAINING:
            makers["liger"] = lambda: _Transformers(case.config, liger=True)
    return {name: make for name, make in makers.items() if wanted is None or name in wanted}


def _proof(case: ModelCase, weights: dict[str, Tensor], dtype: torch.dtype, backend: str, settings: Settings) -> list[str]:
    """What is beyond the budget of fastprimer/testing.py, on the first tokens of a sequence: logits, and the loss's gradients."""
    tokens = case.tokens(1, min(case.length, PROVEN_TOKENS), settings)
    truth = _logits_and_gradients(lambda: reference.Model(case.config), weights, torch.float64, tokens)
    yardstick = _logits_and_gradients(lambda: reference.Model(case.config), weights, dtype, tokens)
    with poisoned_empty():
        got = _logits_and_gradients(lambda: Model(case.config), weights, dtype, tokens)
    problems = []
    for name in truth:
        factor = FORWARD_FACTOR if name == "logits" else GRADIENT_FACTOR
        share = share_of_budget(got[name], truth[name], yardstick[name], factor)
        if not share <= 1:
            problems.append(f"{case} {str(dtype)[6:]} {backend}: {name}: error is {share:.2f} of its budget")
    return problems


def _logits_and_gradients(
    make: Callable[[], nn.Module], weights: dict[str, Tensor], dtype: torch.dtype, tokens: Tensor
) -> dict[str, Tensor]:
    model = _with_weights(make, weights)
    _cast(model, dtype)
    model(tokens, tokens).backward()
    with torch.no_grad():
        return {"logits": model(tokens)} | {name: p.grad for name, p in model.named_parameters()}


def _with_weights(make: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    sample = next(iter(weights.values()))
    with sample.device:  # where a billion random numbers are drawn in no time
        model = make()
    _cast(model, sample.dtype)
    model.load_state_dict(weights)
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights alone: transformers keeps the frequencies of RoPE, a buffer, in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _training_call(make: Callable[[], nn.Module], weights: dict[str, Tensor], tokens: Tensor) -> Callable[[], tuple]:
    """A step; it returns the loss and the clipped gradients, in the order of the names of the weights."""
    model = _with_weights(make, weights)
    named = dict(model.named_parameters())
    parameters = [named[name] for name in weights]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def step() -> tuple:
        optimizer.zero_grad()
        loss = model(tokens, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach(), *(p.grad for p in parameters)

    return step


def _decoding_call(make: Callable[[], nn.Module], weights: dict[str, Tensor], tokens: Tensor) -> Callable[[], Tensor]:
    """The logits of the last token, (B, V); all others are in the cache, and it leaves the cache as it was."""
    model = _with_weights(make, weights).eval()
    decoder = model if isinstance(model, _Transformers) else _Ours(model)
    with torch.no_grad():
        decoder.fill(tokens[:, :-1])

    @torch.no_grad()
    def token() -> Tensor:
        return decoder.next(tokens[:, -1:])

    return token


class _Ours:
    def __init__(self, model: Model):
        self.model = pack_projections(model) if next(model.parameters()).is_cuda else model

    def fill(self, tokens: Tensor) -> None:
        self.cache = self.model.new_cache(len(tokens), tokens.shape[1] + 1)
        self.model(tokens, cache=self.cache)

    def next(self, token: Tensor) -> Tensor:
        logits = self.model(token, cache=self.cache)
        self.cache.keep(self.cache.length - 1)
        return logits[:, -1]


class _Transformers(nn.Module):
    """Hugging Face's model with the call of ours."""

    def __init__(self, config: Config, liger: bool = False):
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        given = config.to_dict()
        theirs = AutoConfig.for_model(given.pop("model_type"), **given)
        how = {"attn_implementation": "sdpa"} | ({"experts_implementation": "grouped_mm"} if config.is_moe else {})
        self.inner = AutoModelForCausalLM.from_config(theirs, **how)
        parameters = inspect.signature(type(self.inner).forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"  # its former name
        self.static = False
        if liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(self.inner)

    def compile(self, *args, **options) -> None:
        self.static = True
        self.inner.compile(*args, **options)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The last token has no successor, and no contestant computes it."""
        shifted = labels[:, 1:].contiguous()
        return self.inner(input_ids=tokens[:, :-1], labels=shifted, shift_labels=shifted, use_cache=False).loss

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        self.inner.load_state_dict(weights, strict=not self.inner.config.tie_word_embeddings)

    def named_parameters(self, *args, **options) -> Iterator[tuple[str, nn.Parameter]]:
        return self.inner.named_parameters(*args, **options)

    def fill(self, tokens: Tensor) -> None:
        from transformers import DynamicCache, StaticCache

        config = self.inner.config
        self.cache = StaticCache(config=config, max_cache_len=tokens.shape[1] + 1) if self.static else DynamicCache(config=config)
        eager = type(self.inner).forward
        eager(self.inner, input_ids=tokens, logits_to_keep=1, **{self.cache_argument: self.cache})

    def next(self, token: Tensor) -> Tensor:
        logits = self.inner(input_ids=token, **{self.cache_argument: self.cache}).logits
        self.cache.crop(-1)
        return logits[:, -1]


def _compiled(model: nn.Module, mode: str = "default") -> nn.Module:
    """In place: the parameters keep their names."""
    model.compile(mode=mode)
    return model
