"""Bodies with a static cache in ONNX Runtime, against the operator, whose cache grows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from latent_cases import Case, problems
from test_onnx_function import (
    CLOSE,
    KINDS,
    assert_all_is_used,
    dimensions,
    forms_of,
    input_names,
    make_model,
    make_node,
    variant_of,
)

from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_variant import CACHED, LATENT, Variant

STEPS = {"prefill": (5, 0), "chunk": (3, 4), "decoding": (1, 6), "first token": (1, 0)}
SPARE = 3
GARBAGE = 1e3
"""What unused rows hold: numbers, or a product with zero would not be zero."""


def static_function(case) -> onnx.FunctionProto:
    op_type = LATENT if isinstance(case, Case) else CACHED
    return attention_function(op_type, 24, replace(variant_of(case), static=True))


def node_of(case, function: onnx.FunctionProto):
    """A node with a static cache, and the dimensions of its inputs and outputs."""
    node = make_node(case, input_names(case), ["output", "present"])
    node.op_type = function.name
    node.attribute.append(onnx.helper.make_attribute("static", 1))
    inputs = dimensions(case)
    return node, inputs, {"output": ["B", "S", case.heads, case.v_dim], "present": inputs["past"]}


def static_model(case, function: onnx.FunctionProto) -> onnx.ModelProto:
    """One node with a static cache."""
    node, inputs, outputs = node_of(case, function)
    return make_model([node], [function], inputs, outputs, 24)


def session_of(case, function: onnx.FunctionProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        static_model(case, function).SerializeToString(), options, ["CPUExecutionProvider"]
    )


def slots_of(case, tokens: int, room: int) -> np.ndarray:
    """Where the rows of so many tokens lie, of which the last that a window lets others see are kept."""
    kept = min(tokens, case.window - 1) if case.window else tokens
    places = np.arange(tokens - kept, tokens)
    return places % room if case.window else places


def room_of(case) -> int:
    return case.window - 1 if case.window else case.past + case.new + SPARE


def static_inputs(case) -> dict[str, np.ndarray]:
    x = {name: value.numpy() for name, value in case.tensors(torch.float32).items()}
    room = room_of(case)
    cache = np.full((case.batch, room, x["row"].shape[2]), GARBAGE, np.float32)
    slots = slots_of(case, case.past, room)
    cache[:, slots] = x["past"][:, x["past"].shape[1] - len(slots) :]
    return x | {"past": cache}


def check(case) -> None:
    """The same outputs and rows as with a cache that grows, written in place, in either form."""
    for form in forms_of(static_function(case)):
        check_form(case, session_of(case, form))


def check_form(case, session: onnxruntime.InferenceSession) -> None:
    x = static_inputs(case)
    binding = session.io_binding()
    for name, value in x.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value))
    cache = onnxruntime.OrtValue.ortvalue_from_numpy(x["past"])
    binding.bind_ortvalue_input("past", cache)
    binding.bind_output("output")
    binding.bind_ortvalue_output("present", cache)
    session.run_with_iobinding(binding)
    output, present = binding.get_outputs()
    assert present.data_ptr() == cache.data_ptr()
    expected, grown = case.operator(**case.tensors(torch.float32), **case.settings())
    torch.testing.assert_close(torch.from_numpy(output.numpy()), expected, **CLOSE)
    total = case.past + case.new
    slots = slots_of(case, total, room_of(case))
    torch.testing.assert_close(
        torch.from_numpy(cache.numpy()[:, slots]), grown[:, grown.shape[1] - len(slots) :], **CLOSE
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].window != 1])
def test_equals_a_cache_that_grows(kind, step):
    new, past = STEPS[step]
    check(replace(KINDS[kind], new=new, past=past))


@given(problems)
@settings(max_examples=60)
def test_equals_a_cache_that_grows_for_any_sizes(case):
    assume(case.window != 1)
    check(case)


@pytest.mark.parametrize("kind", ["grouped", "cached", "everything"])
def test_there_is_no_more_in_a_variant_than_it_needs(kind):
    assert_all_is_used(static_function(KINDS[kind]))


@pytest.mark.parametrize("spare", [0, -1])
def test_no_token_is_lost_for_want_of_room(spare):
    """ONNX Runtime itself refuses what does not fit, whoever calls it."""
    case = KINDS["grouped"]
    session = session_of(case, static_function(case))
    x = static_inputs(case)
    x["past"] = np.zeros((case.batch, case.past + case.new + spare, case.width), np.float32)
    if spare == 0:
        assert np.isfinite(session.run(["output"], x)[0]).all()
    else:
        with pytest.raises(Exception, match="TensorScatter"):
            session.run(["output"], x)


@pytest.mark.parametrize(
    ("opset", "variant"), [(23, Variant(static=True)), (24, Variant(static=True, bidirectional=True))]
)
def test_what_has_no_static_cache(opset, variant):
    with pytest.raises(ValueError, match="static cache needs"):
        attention_function(LATENT, opset, variant)
