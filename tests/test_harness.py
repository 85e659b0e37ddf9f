"""Converted models as a model of the lm-evaluation-harness, where that is installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import models
import numpy as np
import pytest
import torch

import mla_compile
from mla_compile.errors import UsageError
from mla_compile.runtime.generate import generate
from mla_compile.runtime.onnx_session import OnnxDecoder

BEGIN, END = 0, 1
EXACT = 1e-4  # nats: float32 logits of a few dozen tokens, padded or not


@dataclass(frozen=True)
class Request:
    """What the harness hands over, as far as a model looks at it."""

    args: tuple


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mla_compile.evaluation.harness", raising=False)
    with pytest.raises(UsageError, match=r"not installed\. Run: pip install 'mla-compile\[lm-eval\]'\."):
        import mla_compile.evaluation.harness  # noqa: F401


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
    import mla_compile.evaluation.harness

    return mla_compile.evaluation.harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A conversion as a file and as a folder, with a tokenizer of one word per id."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("place")
    vocabulary = ["<s>", "</s>", *(f"w{i}" for i in range(2, models.VOCABULARY))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    model = models.llama(num_hidden_layers=1, max_position_embeddings=24)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)  # so that some tokens are likelier than others
    compiled = mla_compile.compile(model, tokenizer=tokenizer, method="mha2mla", cache_ratio=0.5, check=False)
    compiled.to_onnx(place / "model.onnx")
    compiled.save(place / "folder")
    return place


@pytest.fixture(scope="module", params=["model.onnx", "folder"])
def lm(harness, folder, request):
    return harness.MlaCompileLM(str(folder / request.param), batch_size="2")


@pytest.fixture(scope="module")
def decoder(folder):
    return OnnxDecoder(folder / "model.onnx")


def direct(decoder, given: list[int], targets: list[int]) -> tuple[float, bool]:
    """Oracle: the last predictions on one sequence."""
    logits = decoder.logits(np.array([given]))[0, -len(targets) :].astype(np.float64)
    predicted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(predicted[place, token] for place, token in enumerate(targets)), logits.argmax(-1).tolist() == targets


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_it_is_known_by_its_name(harness, folder):
    from lm_eval.api.registry import get_model

    made = get_model("mla-compile").create_from_arg_string(
        f"path={folder / 'model.onnx'},max_length=12", {"batch_size": 4, "device": "cuda:0"}
    )
    assert isinstance(made, harness.MlaCompileLM)
    assert (made.batch_size, made.max_length) == (4, 12)


def test_pairs(lm, decoder):
    """Also without a context, and with one that is longer than the model."""
    assert lm.max_length == 24
    greedy, long = generate(decoder, [[5, 9]], 2)[0], [(7 * i) % 90 + 2 for i in range(40)]
    pairs = [([5, 9], [4, 3]), ([5, 9], greedy), ([], [8, 6, 4]), (long, [3, 2])]
    given = [[5, 9, 4], [5, 9, greedy[0]], [BEGIN, 8, 6], [*long[-23:], 3]]
    got = lm.loglikelihood([Request((words(a), " " + words(b))) for a, b in pairs])
    expected = [direct(decoder, ids, b) for ids, (_, b) in zip(given, pairs, strict=True)]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=EXACT)
    assert [flag for _, flag in got] == [flag for _, flag in expected]
    assert got[1][1]


def test_whole_texts(lm, decoder):
    """Also one that is longer than the model: as much context as fits."""
    short, long = [4, 8, 15], [(5 * i) % 90 + 2 for i in range(30)]
    got = lm.loglikelihood_rolling([Request((words(ids),)) for ids in (short, long)])
    parts = direct(decoder, [BEGIN, *long[:23]], long[:24]), direct(decoder, long[5:29], long[24:])
    assert got[0] == pytest.approx(direct(decoder, [BEGIN, *short[:2]], short)[0], abs=EXACT)
    assert got[1] == pytest.approx(sum(value for value, _ in parts), abs=EXACT)


def test_generation_stops_at_a_string(lm, decoder):
    greedy = generate(decoder, [[5, 9]], 8, stop=[END])[0]
    asked = {"until": [f"w{greedy[3]}"], "max_gen_toks": 8, "do_sample": False}
    free = {"until": [], "max_gen_toks": 4}
    stopped, whole = lm.generate_until([Request((words([5, 9]), asked)), Request((words([5, 9]), free))])
    expected = words(greedy[: greedy.index(greedy[3])])
    assert stopped.strip() == expected
    assert whole.strip() == words(greedy[:4])


def test_a_model_that_was_not_converted_is_refused(harness, tmp_path):
    model = models.llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="Use the harness's own model 'hf' for originals"):
        harness.MlaCompileLM(str(tmp_path))
