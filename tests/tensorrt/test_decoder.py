"""An engine's runner, with ONNX Runtime in TensorRT's place: all it does but what takes a GPU."""

from __future__ import annotations

import contextlib
import json
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import models
import numpy as np
import pytest
import stand_in_engine
import torch
from conversion import difference

from mla_compile.errors import LoadError, UsageError
from mla_compile.runtime.generate import Sampling, generate
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.tensorrt.engine import TensorRTDecoder, facts_path
from mla_compile.runtime.tensorrt.reference import OnnxFixedDecoder
from mla_compile.runtime.torch_decoder import TorchDecoder

# The same operators on the same numbers, in float32, but for the order of sums.
LOGITS = 1e-4
FACTS = {"tensorrt": "11.4.0", "device": "NVIDIA H200", "onnx": "model.onnx", "version_compatible": False}
PROMPTS = ([5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22])


@pytest.fixture
def tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_engine.module())


@pytest.fixture
def plan(lowered, tmp_path, tensorrt):
    path = tmp_path / "model.plan"
    path.write_bytes(lowered("llama-gqa").path.read_bytes())
    facts_path(path).write_text(json.dumps(FACTS))
    return path


def test_generates_what_the_module_generates(lowered, plan):
    """A prompt that is longer than the profile's, one that is padded, and steps."""
    decoder = TensorRTDecoder(plan, device="cpu")
    assert (decoder.limits.room, decoder.limits.batch, decoder.limits.new) == (32, 3, 6)
    expected = generate(TorchDecoder(lowered("llama-gqa").model), PROMPTS, 9)
    assert decoder.generate(PROMPTS, 9) == expected
    sampling = Sampling(temperature=1.0, top_k=20, seed=4)
    expected = generate(TorchDecoder(lowered("llama-gqa").model), PROMPTS, 5, sampling=sampling)
    assert decoder.generate(PROMPTS, 5, sampling=sampling) == expected


def test_streamed_weights_leave_room_for_the_caches(plan):
    """A budget counts only if it is set before the first context."""
    plain = TensorRTDecoder(plan, device="cpu")
    assert plain._engine.budget_of_contexts == 5_000_000
    facts_path(plan).write_text(json.dumps({**FACTS, "weight_streaming": True}))
    decoder = TensorRTDecoder(plan, device="cpu")
    assert decoder._engine.budget_of_contexts == 4_000_000 - 3 * 32 * decoder.cache_bytes_per_token


def test_steps_run_under_their_profiles_and_in_one_memory(lowered, plan):
    decoder, ids = TensorRTDecoder(plan, device="cpu"), models.tokens(2, 10)
    cache = decoder.empty_cache(2)
    addresses = [rows.data_ptr() for rows in cache.rows]
    assert decoder.measured_bytes(cache) == 2 * 32 * decoder.cache_bytes_per_token
    done, parts = 0, []
    for part in ids.split((8, 1, 1), 1):
        new = np.tile(np.arange(done, done + part.shape[1]), (2, 1))
        done += part.shape[1]
        logits, cache = decoder.step(part.numpy(), np.ones((2, done), np.int64), new, cache)
        parts.append(torch.from_numpy(logits))
    with torch.no_grad():
        expected = lowered("llama-gqa").model(ids).logits
    assert difference(torch.cat(parts, 1), expected) <= LOGITS
    assert decoder._engine.steps == [(1, (2, 6)), (1, (2, 2)), (0, (2, 1)), (0, (2, 1))]
    assert [rows.data_ptr() for rows in cache.rows] == addresses
    # Rows of ten tokens, and nothing behind them.
    assert all(rows[:, :, :10].any(-1).all() and not rows[:, :, 10:].any() for rows in cache.rows)


def test_two_caches_do_not_know_of_each_other(plan):
    decoder = TensorRTDecoder(plan, device="cpu")
    first, second = (decoder.empty_cache(1) for _ in range(2))
    position, mask = np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)
    once, _ = decoder.step(np.array([[7]]), mask, position, first)
    decoder.step(np.array([[3]]), mask, position, second)
    again, _ = decoder.step(np.array([[7]]), mask, position, first)
    assert np.array_equal(once, again)


def test_caches_that_nobody_has_any_more_are_freed(plan):
    decoder = TensorRTDecoder(plan, device="cpu")
    cache, ids = decoder.empty_cache(1), np.array([[7, 8, 9]])
    for start, part in ((0, ids[:, :2]), (2, ids[:, 2:])):  # a step of each profile
        end = start + part.shape[1]
        _, cache = decoder.step(part, np.ones((1, end), np.int64), np.arange(start, end)[None], cache)
    held = [weakref.ref(rows) for rows in cache.rows]
    del cache
    assert [rows() for rows in held] == [None] * len(held)


@pytest.fixture
def graphs(monkeypatch):
    """Every captured graph, where a graph keeps the launches of the stand-in."""
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(stand_in_engine.Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", stand_in_engine.Graph.capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return made


def with_stream(plan):
    decoder = TensorRTDecoder(plan, device="cpu")
    decoder.stream = SimpleNamespace(cuda_stream=0)
    return decoder


def test_steps_of_one_token_are_captured_once_and_replayed(lowered, plan, graphs):
    expected = generate(TorchDecoder(lowered("llama-gqa").model), PROMPTS, 9)
    decoder = with_stream(plan)
    assert decoder.generate(PROMPTS, 9) == expected
    assert [graph.replays for graph in graphs] == [7]  # the prompt, the step that is captured, and seven more
    assert decoder._engine.steps.count((0, (2, 1))) == 8


def test_a_graph_is_captured_anew_when_another_cache_had_the_context(lowered, plan, graphs):
    decoder, model, ids = with_stream(plan), TorchDecoder(lowered("llama-gqa").model), models.tokens(3, 6).numpy()
    batches = (ids[:1], ids[1:])
    mine, theirs = ([x.empty_cache(len(part)) for part in batches] for x in (decoder, model))
    for at in range(6):
        mask = np.ones((2, at + 1), np.int64)
        for i in (0, 1) if at < 3 else (0,):  # in turns, and then the first alone
            part = batches[i][:, at : at + 1]
            given = part, mask[: len(part)], np.full_like(part, at)
            got, mine[i] = decoder.step(*given, mine[i])
            expected, theirs[i] = model.step(*given, theirs[i])
            assert difference(torch.from_numpy(got), torch.from_numpy(expected)) <= LOGITS
    assert [graph.replays for graph in graphs] == [0, 0, 0, 0, 0, 0, 2]


def test_an_engine_that_cannot_be_captured_runs_all_the_same(lowered, plan, graphs, monkeypatch):
    tried = []

    @contextlib.contextmanager
    def refused(graph, **_):
        tried.append(graph)
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    expected = generate(TorchDecoder(lowered("llama-gqa").model), PROMPTS, 9)
    decoder = with_stream(plan)
    assert decoder.generate(PROMPTS, 9) == decoder.generate(PROMPTS, 9) == expected
    assert len(tried) == 1
    assert not decoder.captures


def test_streamed_weights_are_not_captured(lowered, plan, graphs):
    facts_path(plan).write_text(json.dumps({**FACTS, "weight_streaming": True}))
    decoder = with_stream(plan)
    assert decoder.generate(PROMPTS, 9) == generate(TorchDecoder(lowered("llama-gqa").model), PROMPTS, 9)
    assert not graphs


def test_threads_wait_for_each_other(lowered, plan):
    decoder = TensorRTDecoder(plan, device="cpu")
    expected = [generate(TorchDecoder(lowered("llama-gqa").model), [prompt], 9) for prompt in PROMPTS]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert [*pool.map(lambda prompt: decoder.generate([prompt], 9), PROMPTS)] == expected


def test_caches_of_other_sequences_are_refused(lowered, plan):
    for decoder in (TensorRTDecoder(plan, device="cpu"), OnnxFixedDecoder(lowered("llama-gqa").path)):
        one, position = np.ones((1, 1), np.int64), np.zeros((1, 1), np.int64)
        with pytest.raises(
            UsageError, match="The cache is of 2 sequences of 0 tokens, and these are 1 whose mask has 0"
        ):
            decoder.step(one, one, position, decoder.empty_cache(2))
        with pytest.raises(UsageError, match="of 0 tokens, and these are 1 whose mask has 4 earlier ones"):
            decoder.step(one, np.ones((1, 5), np.int64), position, decoder.empty_cache(1))


def test_what_will_not_fit_is_refused_before_it_begins(lowered, plan):
    for decoder in (TensorRTDecoder(plan, device="cpu"), OnnxFixedDecoder(lowered("llama-gqa").path)):
        seen = []
        with pytest.raises(UsageError, match=r"A sequence of 33 tokens does not fit .* room for 32"):
            decoder.generate(PROMPTS, 26, on_tokens=seen.append)
        assert not seen
        assert len(decoder.generate(PROMPTS, 25)[0]) == 25


@pytest.mark.parametrize(
    ("ids", "mask", "sentence"),
    [
        (np.ones((4, 2), np.int64), np.ones((4, 2), np.int64), "takes 3 sequences at once, and these are 4.*max-batch"),
        (np.ones((1, 1), np.int64), np.ones((1, 33), np.int64), "A sequence of 33 tokens .* room for 32.*--max-length"),
        (np.ones((1, 3), np.int64), np.array([[1, 0, 1]]), "Padding stands behind earlier tokens. Pad prompts on the"),
        (np.full((1, 1), models.VOCABULARY), np.ones((1, 1), np.int64), "none of the 97 that"),
        (np.full((1, 1), -1), np.ones((1, 1), np.int64), "Token -1 is none of the 97 that"),
        (np.ones((1, 3), np.int64), np.ones((1, 2), np.int64), r"3 new tokens with a mask of shape \[1, 2\]"),
        (np.ones((2, 1), np.int64), np.ones((1, 5), np.int64), r"2 sequences of .* with a mask of shape \[1, 5\]"),
        (np.ones((1, 0), np.int64), np.ones((1, 2), np.int64), "hold no new tokens"),
    ],
    ids=["batch", "room", "padding", "token", "negative token", "short mask", "mask of one", "no tokens"],
)
def test_what_does_not_fit_is_one_sentence(plan, ids, mask, sentence):
    decoder = TensorRTDecoder(plan, device="cpu")
    with pytest.raises(UsageError, match=sentence):
        decoder.step(ids, mask, np.zeros_like(ids), decoder.empty_cache(len(ids)))


def test_an_engine_for_another_version_is_one_sentence(plan):
    plan.write_bytes(b"another version")
    facts_path(plan).write_text(json.dumps(FACTS | {"tensorrt": "10.16"}))
    sentence = r"TensorRT 11\.4\.0 cannot load .* which TensorRT 10\.16 built for NVIDIA H200 \(The engine plan"
    with pytest.raises(LoadError, match=f"{sentence}.*Build it again here: mla-compile tensorrt .*model.onnx --out"):
        TensorRTDecoder(plan, device="cpu")


def test_missing_and_damaged_files_are_one_sentence(plan, tmp_path):
    with pytest.raises(LoadError, match=r"There is no file '.*other\.plan'"):
        TensorRTDecoder(tmp_path / "other.plan", device="cpu")
    facts_path(plan).write_text("[]")
    with pytest.raises(LoadError, match="does not describe an engine"):
        TensorRTDecoder(plan, device="cpu")
    facts_path(plan).unlink()
    with pytest.raises(LoadError, match=r"There is no file '.*model\.plan\.json'"):
        TensorRTDecoder(plan, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_sentence(plan):
    with pytest.raises(UsageError, match="none here that torch can use"):
        TensorRTDecoder(plan)


def test_files_of_the_two_kinds_are_told_apart(lowered, tmp_path):
    with pytest.raises(LoadError, match=r"is a file for TensorRT.*mla-compile tensorrt .* --out FILE\.plan"):
        OnnxDecoder(lowered("llama-gqa").path)
    (tmp_path / "damaged.onnx").write_bytes(b"no file")
    with pytest.raises(LoadError, match="ONNX Runtime cannot load"):
        OnnxFixedDecoder(tmp_path / "damaged.onnx")


def test_whole_sequences_in_onnx_runtime(lowered):
    case, ids = lowered("llama-gqa"), models.tokens(2, 12)
    decoder = OnnxFixedDecoder(case.path)
    with torch.no_grad():
        expected = case.model(ids).logits
    assert difference(torch.from_numpy(decoder.logits(ids.numpy())), expected) <= LOGITS
    assert decoder.generate(PROMPTS, 6) == generate(TorchDecoder(case.model), PROMPTS, 6)


def test_padding_may_be_longer_than_the_room(lowered, plan):
    """It is not written, and the tokens behind it come as if it were not there."""
    ids = models.tokens(1, 40).numpy()
    mask = (np.arange(40) >= 32).astype(np.int64)[None]
    for decoder in (OnnxFixedDecoder(lowered("llama-gqa").path), TensorRTDecoder(plan, device="cpu")):
        expected = decoder.logits(ids[:, 32:])
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        got, _ = decoder.step(ids, mask, positions, decoder.empty_cache(1))
        assert difference(torch.from_numpy(got[:, 32:]), torch.from_numpy(expected)) <= LOGITS
