"""fp.attention behind transformers' interface: every kind of mask, cache and layer gives what transformers' own attention gives."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastprimer as fp

transformers = pytest.importorskip("transformers")

from hf_checks import DEEPSEEK, MLA, close, gradients, pair, tiny  # noqa: E402

from fastprimer.integrations import hf_attention  # noqa: E402
from fastprimer.integrations.transformers import patch  # noqa: E402


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(name, cache, tokens):
    model, plain, _ = pair(name)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(model.eval().generate(tokens, **options), plain.eval().generate(tokens, **options))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_other_masks(name, tokens):
    model, plain, _ = pair(name)
    model.eval(), plain.eval()
    holes = torch.ones_like(tokens)
    holes[1, 3] = holes[1, 5] = 0
    kept = holes.bool()
    close([model(tokens, attention_mask=holes).logits[kept]], [plain(tokens, attention_mask=holes).logits[kept]])
    added = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    close([model(tokens, attention_mask=added).logits], [plain(tokens, attention_mask=added).logits])
    first, second = model(tokens[:, :5], use_cache=True), plain(tokens[:, :5], use_cache=True)
    (cache,) = {"cache", "past_key_values"} & first.keys()
    close([model(tokens[:, 5:], **{cache: first[cache]}).logits], [plain(tokens[:, 5:], **{cache: second[cache]}).logits])
    whole, ends = tokens.view(1, 18), torch.tensor([0, 5, 12, 18], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (5, 7, 6)])[None]
    expected = plain(whole, position_ids=positions, use_cache=False).logits
    close([model(whole, position_ids=positions, use_cache=False).logits], [expected])
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    close([model(whole, position_ids=positions, use_cache=False, **packed).logits], [expected])


def test_what_is_plainly_masked_needs_no_mask(monkeypatch, tokens):
    served = []
    monkeypatch.setattr(hf_attention, "by_torch", lambda *args, **kwargs: served.append("torch"))
    model, _, _ = pair("mistral")
    model.eval()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    model(tokens), model(tokens, attention_mask=mask), model.generate(tokens, attention_mask=mask, max_new_tokens=3)
    assert not served


def mask_of(S, T, **options):
    known = inspect.signature(transformers.masking_utils.sdpa_mask).parameters
    queries = {"cache_position": torch.arange(S)} if "cache_position" in known else {"q_length": S}
    return hf_attention.mask(batch_size=1, kv_length=T, **queries, **options)


def test_what_else_is_masked_needs_one():
    config = SimpleNamespace(sliding_window=4)
    assert mask_of(9, 9, local_size=4, config=config).window == 4
    config.attention_chunk_size = 4  # then the local size may be that of chunks
    assert isinstance(mask_of(9, 9, local_size=4, config=config), torch.Tensor)
    assert mask_of(4, 6).shape == (1, 1, 4, 6)  # queries that are not the last tokens
    assert mask_of(4, 4, mask_function=lambda b, h, q, k: q != k, allow_is_causal_skip=False).shape == (1, 1, 4, 4)


def test_attention_with_dropout_or_wide_heads_is_torchs(tokens):
    class Module(nn.Module):
        is_causal = True

    q, k, v = torch.randn(2, 4, 5, 300), torch.randn(2, 2, 7, 300), torch.randn(2, 2, 7, 16)
    bias = torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(3).bool(), -torch.inf)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2)
    close([hf_attention.attention(Module(), q, k, v, None)[0]], [expected])
    q, k = q[..., :16], k[..., :16]
    sinks = torch.randn(4)
    served = fp.attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, window=(2, 0), softcap=3.0, sinks=sinks)
    band, options = hf_attention.Banded((2, 1, 5, 7), True, 3), {"softcap": 3.0, "s_aux": sinks}
    close([hf_attention.attention(Module(), q, k, v, band, dropout=1e-12, **options)[0]], [served])
    thinned = hf_attention.attention(Module(), q, k, v, band, dropout=0.5, **options)[0]
    assert (thinned - served).abs().max() > 0.01


@pytest.mark.parametrize("length", [9, 5])
def test_encoders_and_cross_attention(length, tokens):
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, decoder_start_token_id=2)).eval()
    plain = copy.deepcopy(model)
    assert patch(model).replaced == {"BartForConditionalGeneration: attention": 1}
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens.flip(1)[:, :length]}
    close([model(**inputs).logits], [plain(**inputs).logits])


def test_a_query_that_sees_nothing_has_no_gradient(tokens):
    model, _, _ = pair("gemma2", attention_dropout=0.1)  # dropout is torch's business
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    assert all(t is None or t.isfinite().all() for t in gradients(model.train(), input_ids=tokens, attention_mask=mask, labels=tokens))


def test_a_window_is_what_the_mask_says(tokens):
    """olmoe hands a window to its attention that its mask does not have."""
    model, plain, _ = pair("olmoe", sliding_window=4)
    close([model.eval()(tokens).logits], [plain.eval()(tokens).logits])


@pytest.mark.skipif("deepseek_v32" not in transformers.CONFIG_MAPPING, reason="these transformers have none")
def test_sparse_attention_is_left_alone():
    model = tiny("deepseek_v32", **MLA, **DEEPSEEK)
    patched = patch(model)
    assert "asks whether its attention is called sdpa" in patched.left["DeepseekV32ForCausalLM: attention"]
    with pytest.raises(NotImplementedError, match="indices: expected None: sparse attention is not supported"):
        hf_attention.attention(nn.Module(), *(torch.randn(1, 2, 3, 16) for _ in "qkv"), None, indices=torch.zeros(1, 3, 2))
