"""An engine with the plugins, on a GPU: the same numbers as the module. Nobody has run this yet: see the docs."""

from __future__ import annotations

import models
import pytest
import torch
from conversion import difference

pytestmark = pytest.mark.gpu
BATCH, PROMPT, STEPS, ROOM = 2, 9, 3, 32
# float32 matrices may be multiplied as TF32, with 10 bits.
LOGITS = 5e-3


@pytest.fixture(scope="module")
def trt():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # This folder has its name, and would be imported as a package of nothing: of a module within that cannot happen.
    pytest.importorskip("tensorrt.plugin", reason="TensorRT is not installed: .[tensorrt]", exc_type=ImportError)
    import tensorrt as trt

    from mla_compile.runtime.tensorrt.plugins import register

    major, minor = torch.cuda.get_device_capability()
    register(10 * major + minor)
    return trt


def build(trt, path, layers):
    """An engine whose attention is the plugins'."""
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from 11 on
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(trt.LayerType.PLUGIN_V3) == 3 * layers
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        room = tensor.name.startswith("past")
        least, most = (
            tuple(
                (BATCH, ROOM if room else new)[axis] if extent < 0 else extent
                for axis, extent in enumerate(tensor.shape)
            )
            for new in (1, PROMPT)
        )
        profile.set_shape(tensor.name, least, least, most)
    config.add_optimization_profile(profile)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return trt.Runtime(log).deserialize_cuda_engine(plan)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_engine_equals_the_module(trt, lowered, name):
    case, ids = lowered(name), models.tokens(BATCH, PROMPT + STEPS)
    engine = build(trt, case.path, len(case.model.rows))
    context, stream = engine.create_execution_context(), torch.cuda.Stream()
    caches = [torch.full((BATCH, ROOM, row), torch.nan, device="cuda") for row in case.model.rows]
    done, parts = 0, []
    for part in ids.split([PROMPT, *[1] * STEPS], 1):
        new = part.shape[1]
        positions = torch.arange(done, done + new).expand(BATCH, new).contiguous()
        done += new
        lengths = torch.full((BATCH,), done, dtype=torch.int32)
        logits = torch.empty(BATCH, new, models.VOCABULARY, device="cuda")
        tensors = {"input_ids": part.contiguous().cuda(), "lengths": lengths.cuda(), "position_ids": positions.cuda()}
        tensors |= {"logits": logits}
        for i, cache in enumerate(caches):  # written in place: input and output are the same memory
            tensors |= {f"past_key_values.{i}.latent": cache, f"present.{i}.latent": cache}
        for tensor, value in tensors.items():
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
                assert context.set_input_shape(tensor, tuple(value.shape))
            assert context.set_tensor_address(tensor, value.data_ptr())
        torch.cuda.synchronize()
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        parts.append(logits.cpu())
    with torch.no_grad():
        expected = case.model(ids).logits
    assert difference(torch.cat(parts, 1), expected) <= LOGITS
