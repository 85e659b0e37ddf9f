"""Engines on a GPU: the same numbers as the module. Nobody has run this yet: see the docs."""

from __future__ import annotations

import json

import models
import numpy as np
import pytest
import torch
from conversion import difference

from mla_compile.runtime.generate import generate
from mla_compile.runtime.torch_decoder import TorchDecoder

pytestmark = pytest.mark.gpu
BATCH, PROMPT, STEPS = 2, 9, 4
# float32 matrices may be multiplied as TF32, with 10 bits.
LOGITS = 5e-3


@pytest.fixture(scope="module")
def trt():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # This folder has its name, and would be imported as a package of nothing: of a module within that cannot happen.
    pytest.importorskip("tensorrt.plugin", reason="TensorRT is not installed: .[tensorrt]", exc_type=ImportError)
    import tensorrt as trt

    return trt


@pytest.fixture(params=["plugins", "bodies"])
def decoder(request, trt, lowered, tmp_path):
    """A decoder by name of the model."""
    from mla_compile.runtime.tensorrt.engine import TensorRTDecoder, facts_path
    from mla_compile.runtime.tensorrt.engine_builder import EngineSettings, build_engine, use_plugins

    if request.param == "plugins" and (reason := use_plugins()):
        pytest.skip(reason)

    def open_engine(name):
        case, path = lowered(name), tmp_path / "model.plan"
        # Registered plugins are taken: a file that names another namespace has none.
        source = case.path
        if request.param == "bodies":
            source = tmp_path / "bodies.onnx"
            source.write_bytes(case.path.read_bytes().replace(b"plugin_namespace", b"plugin_nameless_"))
        settings = EngineSettings(batch=BATCH, room=32, prompt=5)
        engine, plugins = build_engine(trt, source, settings, plugins=request.param == "plugins")
        assert plugins == (3 * len(case.model.rows) if request.param == "plugins" else 0)
        path.write_bytes(engine)
        facts = {"tensorrt": trt.__version__, "device": "this", "onnx": "", "version_compatible": False}
        facts_path(path).write_text(json.dumps(facts))
        return TensorRTDecoder(path)

    return open_engine


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "chunks"])
def test_engine_equals_the_module(decoder, lowered, name):
    """A prompt in two parts, a step that runs, and steps that are replayed."""
    made, model, ids = decoder(name), lowered(name).model, models.tokens(BATCH, PROMPT + STEPS)
    cache, done, parts = made.empty_cache(BATCH), 0, []
    for part in ids.split([PROMPT, *[1] * STEPS], 1):
        positions = np.tile(np.arange(done, done + part.shape[1]), (BATCH, 1))
        done += part.shape[1]
        logits, cache = made.step(part.numpy(), np.ones((BATCH, done), np.int64), positions, cache)
        parts.append(torch.from_numpy(logits))
    with torch.no_grad():
        expected = model(ids).logits
    assert difference(torch.cat(parts, 1), expected) <= LOGITS


def test_prompts_of_several_lengths_are_continued(decoder, lowered):
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]]
    expected = generate(TorchDecoder(lowered("llama-gqa").model), prompts, 9)
    assert decoder("llama-gqa").generate(prompts, 9) == expected
