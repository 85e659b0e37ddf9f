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

BEGIN = 0
EXACT = 1e-4  # nats: float32 logits of a few dozen tokens, padded or not


@dataclass(frozen=True)
class Request:
    """What the harness hands over, as far as a model looks at it."""

    args: tuple


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mla_compile.harness", raising=False)
    with pytest.raises(UsageError, match=r"not installed\. Run: pip install 'mla-compile\[lm-eval\]'\."):
        import mla_compile.harness  # noqa: F401


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
    import mla_compile.harness

    return mla_compile.harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A conversion as a file and as a folder, with a tokenizer of one word per id."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("place")
    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(models.VOCABULARY)}, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w0", eos_token="w1")
    model = models.llama(num_hidden_layers=1, max_position_embeddings=24)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)  # so that some tokens are likelier than others
    compiled = mla_compile.compile(model, tokenizer=tokenizer, cache_ratio=0.5, check=False)
    compiled.to_onnx(place / "model.onnx")
    compiled.save(place / "folder")
    return place


@pytest.fixture(scope="module", params=["model.onnx", "folder"])
def lm(harness, folder, request):
    return harness.MlaCompileLM(str(folder / request.param), batch_size="2")


@pytest.fixture(scope="module")
def decoder(folder):
    return OnnxDecoder(folder / "model.onnx")


def direct(decoder, ids: list[int], scored: int) -> tuple[float, bool]:
    """Oracle: one sequence, its last tokens."""
    logits = decoder.logits(np.array([ids]))[0, -scored - 1 : -1].astype(np.float64)
    chosen = np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), np.array(ids[-scored:])[:, None], 1)
    return chosen.sum(), logits.argmax(-1).tolist() == ids[-scored:]


def words(ids) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_it_is_known_by_its_name(harness, folder):
    from lm_eval.api.registry import get_model

    made = get_model("mla-compile").create_from_arg_string(
        f"path={folder / 'model.onnx'},max_length=12", {"batch_size": 4, "device": None}
    )
    assert isinstance(made, harness.MlaCompileLM)
    assert (made.batch_size, made.max_length) == (4, 12)


def test_pairs(lm, decoder):
    """Also from nothing, and where the context is longer than the model."""
    assert lm.max_length == 24
    long = [(7 * i) % 90 + 2 for i in range(40)]
    greedy = generate(decoder, [[5, 9]], 2)[0]
    cases = [([5, 9], [4, 3]), ([5, 9], greedy), ([], [8, 6, 4]), (long, [3, 2])]
    got = lm.loglikelihood([Request((words(a), " " + words(b) if a else words(b))) for a, b in cases])
    expected = [direct(decoder, ((a or [BEGIN]) + b)[-25:], len(b)) for a, b in cases[:3]]
    expected.append(direct(decoder, [*long, 3, 2][-24:], 2))
    for (value, flag), (reference, likely) in zip(got[:3], expected, strict=False):
        assert value == pytest.approx(reference, abs=EXACT)
        assert flag == likely
    assert got[1][1]
    # The model is given 24 tokens, of which the last two predictions count: one more of the context than in `direct`.
    logits = decoder.logits(np.array([[*long, 3][-24:]]))[0, -2:].astype(np.float64)
    chosen = logits[[0, 1], [3, 2]] - np.log(np.exp(logits).sum(-1))
    assert got[3][0] == pytest.approx(chosen.sum(), abs=EXACT)


def test_whole_texts(lm, decoder):
    short, long = [4, 8, 15], [(5 * i) % 90 + 2 for i in range(30)]
    got = lm.loglikelihood_rolling([Request((words(ids),)) for ids in (short, long)])
    assert got[0] == pytest.approx(direct(decoder, [BEGIN, *short], 3)[0], abs=EXACT)
    first, _ = direct(decoder, [BEGIN, *long[:23]], 23)
    logits = decoder.logits(np.array([long[:23]]))  # what follows needs the windows of the test of log-likelihoods
    assert logits.shape[1] == 23
    assert got[1] < first


def test_generation_stops_at_a_string(lm, decoder):
    greedy = generate(decoder, [[5, 9]], 8)[0]
    asked = {"until": [f"w{greedy[3]}"], "max_gen_toks": 8, "do_sample": False}
    free = {"until": [], "max_gen_toks": 4}
    stopped, whole = lm.generate_until([Request((words([5, 9]), asked)), Request((words([5, 9]), free))])
    expected = words(greedy[: greedy.index(greedy[3])])
    assert stopped.strip() == expected
    assert whole.strip() == words(greedy[:4])


def test_a_model_that_was_not_converted_is_refused(harness, tmp_path, folder):
    model = models.llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="Use the harness's own model 'hf' for originals"):
        harness.MlaCompileLM(str(tmp_path))
    with pytest.raises(UsageError, match="Leave --device out"):
        harness.MlaCompileLM(str(folder / "folder"), device="cuda")
