"""The ONNX body of ``LatentAttention`` in ONNX Runtime, against the reference."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from latent_cases import Case, cases
from onnx import TensorProto, helper

from mla_compile.runtime import reference
from mla_compile.runtime.onnx_function import DOMAIN, OP_TYPE, VERSION, latent_attention_function

# float32 rounds by 6e-8 of numbers up to about 30; two products and a softmax in between make some 1e-6 of that.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
INPUTS = ("query", "row", "past", "attention_mask", "cos", "sin", "key_up", "value_up")
KINDS = {
    "grouped": Case(),
    "no rope": Case(half=0, rope_groups=1),
    "no rope, rope groups": Case(half=0),
    "all rope": Case(nope=0),
    "one rope key for all heads": Case(rope_groups=1),
    "rope key and up-projection per head": Case(rope_groups=4, up_groups=4),
    "up-projection per head": Case(up_groups=4),
    "one up-projection for all heads": Case(up_groups=1),
    "one head": Case(heads=1, rope_groups=1, up_groups=1),
    "window": Case(window=2),
    "window of one": Case(window=1),
}
STEPS = {"prefill": (5, 0), "chunk": (3, 4), "decoding": (1, 6), "first token": (1, 0)}


def one_node_model(case: Case, opset: int = 23, inline: bool = False) -> onnx.ModelProto:
    """A model that is nothing but the node and its function; batch, new and past lengths are free."""
    node = helper.make_node(
        OP_TYPE,
        INPUTS,
        ["output", "present"],
        domain=DOMAIN,
        num_heads=case.heads,
        rope_groups=case.rope_groups,
        rope_dim=2 * case.half,
        latent_rank=case.rank,
        scale=case.scale,
        window=case.window,
    )
    width = case.rank + case.rope_groups * 2 * case.half
    shapes = {
        "query": ["B", "S", case.heads, case.nope + 2 * case.half],
        "row": ["B", "S", width],
        "past": ["B", "P", width],
        "attention_mask": ["B", "T"],
        "cos": ["B", "S", case.rope_groups, case.half],
        "sin": ["B", "S", case.rope_groups, case.half],
        "key_up": [case.up_groups, case.nope, case.rank],
        "value_up": [case.up_groups, case.rank, case.v_dim],
    }
    kinds = {name: TensorProto.INT64 if name == "attention_mask" else TensorProto.FLOAT for name in INPUTS}
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in INPUTS],
        [
            helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", "S", case.heads, case.v_dim]),
            helper.make_tensor_value_info("present", TensorProto.FLOAT, ["B", "T", width]),
        ],
    )
    model = helper.make_model(
        graph,
        functions=[latent_attention_function(opset)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return onnx.inliner.inline_local_functions(model) if inline else model


def run(model: onnx.ModelProto, x) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {name: x[name].numpy() for name in INPUTS})]


def check(case: Case, opset: int = 23, inline: bool = False) -> None:
    x = case.tensors(torch.float32)
    got, cache = run(one_node_model(case, opset, inline), x)
    expected, expected_cache = reference.latent_attention(**x, **case.settings("reference"))
    torch.testing.assert_close(got.double(), expected, **CLOSE)
    torch.testing.assert_close(cache.double(), expected_cache, **CLOSE)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind, step):
    new, past = STEPS[step]
    check(replace(KINDS[kind], new=new, past=past))


@given(cases())
@settings(max_examples=40)
def test_equals_the_reference_for_any_sizes(case: Case):
    check(case)


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_inlined_model_equals_the_reference_and_is_standard(kind, opset):
    model = one_node_model(KINDS[kind], opset, inline=True)
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {""}
    check(KINDS[kind], opset, inline=True)


@pytest.mark.parametrize("opset", [23, 24])
def test_function_imports_the_wanted_operators(opset):
    function = latent_attention_function(opset)
    assert (function.domain, function.name) == (DOMAIN, OP_TYPE)
    assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", opset)]
    assert {node.domain for node in function.node} == {""}
    check(Case(), opset)


def test_sequences_of_padding_alone_are_finite():
    case = Case(padding=((0, 7), (7, 0)), window=2)
    assert all(y.isfinite().all() for y in run(one_node_model(case), case.tensors(torch.float32)))


def test_one_session_serves_every_step():
    """The sizes of prefill and decoding are those of the inputs, not constants of the model."""
    case = Case(padding=((0, 0), (2, 0)))
    x = case.tensors(torch.float32)
    model = one_node_model(case)
    whole, _ = run(model, x | {"past": x["past"][:, :0], "attention_mask": x["attention_mask"][:, : case.new]})
    cache, parts = x["past"][:, :0], []
    for place in range(case.new):
        part = {name: x[name][:, place : place + 1] for name in ("query", "row", "cos", "sin")}
        mask = x["attention_mask"][:, : place + 1]
        output, cache = run(model, x | part | {"past": cache, "attention_mask": mask})
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
