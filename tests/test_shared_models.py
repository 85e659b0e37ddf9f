"""Real trained models, when they are at hand: the figures of the original, and conversions of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from trained import shared_model, shared_text

import mla_compile
from mla_compile.cli import main
from mla_compile.passes.methods import METHODS
from mla_compile.runtime.onnx_session import OnnxDecoder

TEXT, CALIBRATION = "tinystories_valid_a.txt", "tinystories_train_head.txt"
CHARACTERS = 30_000  # of each text; enough for the tokens that are measured
ROUNDING = 1e-5  # of the largest logit
TOKENS = 2048

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("read_once")]


@pytest.fixture(scope="module", params=["stories260k", "gqa4m", "mha4m"])
def folder(request):
    return shared_model(request.param)


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory):
    """The beginnings of a text to measure on and of one to calibrate on."""
    place = tmp_path_factory.mktemp("text")
    for name in (TEXT, CALIBRATION):
        (place / name).write_text(shared_text(name).read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def original(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(folder, original, text):
    """The stream and windows of `shared/tools/ppl.py`, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer, ids = AutoTokenizer.from_pretrained(folder), []
    for document in (text / TEXT).read_text(encoding="utf-8").split("<|endoftext|>"):
        if document.strip():
            ids += [tokenizer.bos_token_id, *tokenizer(document.strip(), add_special_tokens=False).input_ids]
    length = min(512, original.config.max_position_embeddings)
    return torch.tensor(ids[: TOKENS // length * length]).view(-1, length)


def perplexity(score, windows) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(score(w[None])[0, :-1].double(), w[1:], reduction="sum") for w in windows]
    return math.exp(sum(losses) / (windows.numel() - len(windows)))


@pytest.fixture(scope="module")
def evaluate(text):
    def call(model: Path) -> dict:
        words = ["eval", str(model), "--text", str(text / TEXT), "--max-tokens", str(TOKENS), "--json"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(words) == 0
        return json.loads(out.getvalue())

    return call


def test_perplexity_of_the_original_is_that_of_the_reference_tool(folder, original, windows, evaluate):
    found = evaluate(folder)
    assert found["perplexity"] == pytest.approx(
        perplexity(lambda x: original(x, use_cache=False).logits, windows), rel=1e-5
    )
    assert (found["tokens"], found["seq_len"]) == (windows.numel() - len(windows), windows.shape[1])
    config = original.config
    kept = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert found["cache_bytes_per_token"] == 4 * kept


def test_exact_conversion_is_the_original(folder, original, windows, evaluate, tmp_path):
    """Logits of whole windows, perplexity, and 200 greedy tokens as transformers generates them with its own cache."""
    from transformers import GenerationConfig

    compiled = mla_compile.compile(folder, exact=True)
    compiled.to_onnx(tmp_path / "exact.onnx")
    decoder = OnnxDecoder(tmp_path / "exact.onnx")
    with torch.no_grad():
        expected = original(windows[:2], use_cache=False).logits
    for got in (compiled.module(windows[:2]).logits.detach(), torch.from_numpy(decoder.logits(windows[:2].numpy()))):
        assert (got - expected).abs().max() < ROUNDING * expected.abs().max()
    assert evaluate(tmp_path / "exact.onnx")["perplexity"] == pytest.approx(evaluate(folder)["perplexity"], rel=1e-4)
    prompt = windows[:1, :12]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=200, eos_token_id=-1, pad_token_id=0)
    written = original.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    assert decoder.generate(prompt.tolist(), 200)[0] == written[0, 12:].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_half_of_the_cache_in_both_runtimes(folder, windows, text, evaluate, tmp_path, method):
    compiled = mla_compile.compile(folder, calibration=text / CALIBRATION, method=method, cache_ratio=0.5)
    compiled.to_onnx(tmp_path / "half.onnx")
    found = evaluate(tmp_path / "half.onnx")
    expected = perplexity(lambda ids: compiled.module(ids).logits, windows)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["cache_bytes_per_token"] == compiled.report.cache_bytes_after <= compiled.report.cache_bytes_before / 2
    # The best conversion costs so little that few tokens may not show it; MHA2MLA's shows everywhere.
    assert compiled.report.quality.ratio > (1 if method == "mha2mla" else 0.99)
    with torch.no_grad():
        ids = windows[:1, :64]
        logits = compiled.module(ids).logits
        got = torch.from_numpy(OnnxDecoder(tmp_path / "half.onnx").logits(ids.numpy()))
        assert (got - logits).abs().max() < ROUNDING * logits.abs().max()
