"""The ONNX bodies of ``LatentAttention`` and ``CachedAttention`` in ONNX Runtime, against the reference."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import product

import onnx
import onnx.inliner
import onnx_ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from latent_cases import CachedCase, Case, cached_cases, cases
from onnx import TensorProto, helper
from onnx_ir.passes.common import InlinePass

from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_variant import CACHED, DOMAIN, LATENT, VERSION, Variant

# float32 rounds by 6e-8 of numbers up to about 30; two products and a softmax in between make some 1e-6 of that.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
VARIANTS = {
    LATENT: [
        Variant(*features, scaled_rope=scaled)
        for features in product([False, True], repeat=6)
        for scaled in (False, True)[: 1 + features[0]]
    ],
    CACHED: [Variant(False, *features) for features in product([False, True], repeat=4)],
}
EVERY_VARIANT = [
    pytest.param(op_type, variant, id=variant.named(op_type))
    for op_type, variants in VARIANTS.items()
    for variant in variants
]
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
    "chunks": Case(window=3, chunked=True),
    "chunks, slopes": Case(window=4, chunked=True, slopes=True),
    "chunks of one": Case(window=1, chunked=True),
    "one key scale": Case(key_scales=1),
    "key scales, all rope": Case(nope=0, key_scales=2),
    "key scales, no rope": Case(half=0, key_scales=4),
    "key scales, one head": Case(heads=1, rope_groups=1, up_groups=1, key_scales=1),
    "one value scale": Case(value_scales=1),
    "value scales, no rope": Case(half=0, value_scales=4),
    "value scales, all rope": Case(nope=0, value_scales=2),
    "key and value scales": Case(key_scales=1, value_scales=2),
    "scaled rope": Case(key_scales=2, rope_groups=1, scaled_rope=True),
    "scaled rope, groups": Case(key_scales=4, scaled_rope=True),
    "scaled rope, one key scale, value scales": Case(key_scales=1, rope_groups=1, value_scales=2, scaled_rope=True),
    "scaled rope, no rope": Case(half=0, key_scales=2, scaled_rope=True),
    "scaled rope, all rope": Case(nope=0, key_scales=2, scaled_rope=True),
    "scaled rope and everything": Case(
        key_scales=2, value_scales=4, softcap=1.5, sinks=True, slopes=True, window=3, scaled_rope=True
    ),
    "everything": Case(key_scales=2, value_scales=4, softcap=1.5, sinks=True, slopes=True, window=3),
    "everything, no rope": Case(half=0, key_scales=2, value_scales=2, softcap=1.5, sinks=True, slopes=True, window=3),
    "cached": CachedCase(),
    "cached, one key": CachedCase(kv_heads=1),
    "cached, key per head": CachedCase(kv_heads=4),
    "cached, chunks": CachedCase(window=3, chunked=True),
    "cached, everything": CachedCase(softcap=1.5, sinks=True, slopes=True, window=3),
}
STEPS = {"prefill": (5, 0), "chunk": (3, 4), "decoding": (1, 6), "first token": (1, 0)}


def variant_of(case) -> Variant:
    keys, values = (bool(getattr(case, name, 0)) for name in ("key_scales", "value_scales"))
    scaled = getattr(case, "scaled_rope", False)
    features = (keys, bool(case.softcap), bool(case.window), case.sinks, case.slopes, values)
    return Variant(*features, scaled_rope=scaled, chunked=case.chunked and bool(case.window))


def case_of(op_type: str, variant: Variant):
    """A problem with these features."""
    numbers = {"softcap": 1.5 if variant.softcap else 0.0, "window": 3 if variant.window else 0}
    features = numbers | {"sinks": variant.sinks, "slopes": variant.slopes, "chunked": variant.chunked}
    if op_type == CACHED:
        return CachedCase(**features)
    scales = {"key_scales": 2 * variant.key_scales, "value_scales": 4 * variant.value_scales}
    return Case(**features, **scales, scaled_rope=variant.scaled_rope)


def make_node(case, inputs, outputs) -> onnx.NodeProto:
    latent = isinstance(case, Case)
    sizes = (
        {
            "rope_groups": case.rope_groups,
            "rope_dim": 2 * case.half,
            "latent_rank": case.rank,
        }
        if latent
        else {"kv_heads": case.kv_heads}
    )
    variant = variant_of(case)
    if variant.key_scales:
        sizes["key_scales"] = case.key_scales
    if variant.value_scales:
        sizes["value_scales"] = case.value_scales
    if variant.softcap:
        sizes["softcap"] = case.softcap
    if variant.window:
        sizes["window"] = case.window
    flags = {f"has_{name}": 1 for name in ("sinks", "slopes") if getattr(variant, name)}
    flags |= {name: 1 for name in ("scaled_rope", "chunked") if getattr(variant, name)}
    return helper.make_node(
        variant.named(LATENT if latent else CACHED),
        inputs,
        outputs,
        domain=DOMAIN,
        num_heads=case.heads,
        scale=case.scale,
        **sizes,
        **flags,
    )


def function_of(case, opset: int = 23) -> onnx.FunctionProto:
    return attention_function(LATENT if isinstance(case, Case) else CACHED, opset, variant_of(case))


def forms_of(function: onnx.FunctionProto) -> list[onnx.FunctionProto]:
    """The function with each of its branches as its only one."""
    choice = next((i for i, node in enumerate(function.node) if node.op_type == "If"), None)
    if choice is None:
        return [function]
    forms = []
    for branch in function.node[choice].attribute:
        form = onnx.FunctionProto()
        form.CopyFrom(function)
        result = helper.make_node("Identity", [branch.g.output[0].name], list(function.node[choice].output))
        del form.node[:]
        form.node.extend([*function.node[:choice], *branch.g.node, result, *function.node[choice + 1 :]])
        forms.append(form)
    return forms


def every_node(nodes):
    """Nodes and those of their branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from every_node(attribute.g.node)


def input_names(case) -> list[str]:
    """In the order of the operator's arguments."""
    first = ["query", "row", "past", "attention_mask"]
    return first + [name for name in case.tensors() if name not in first]


def dimensions(case) -> dict[str, list[str | int]]:
    """Of all inputs; batch, new and past lengths are free."""
    free = {"query": ["B", "S"], "row": ["B", "S"], "past": ["B", "P"], "cos": ["B", "S"], "sin": ["B", "S"]}
    names = {name: free.get(name, []) for name in input_names(case)}
    tensors = case.tensors()
    shapes = {name: [*names[name], *tensors[name].shape[len(names[name]) :]] for name in names}
    return shapes | {"attention_mask": ["B", "T"]}


def result_dimensions(case) -> list[list[str | int]]:
    return [["B", "S", case.heads, case.v_dim], ["B", "T", dimensions(case)["row"][-1]]]


def make_model(nodes, functions, inputs, outputs, opset: int = 23, codes=()) -> onnx.ModelProto:
    """A model of ours, checked; ``inputs`` and ``outputs`` map names to dimensions, ``codes`` are those of bytes."""

    def described(name, shape):
        kind = TensorProto.INT64 if name.startswith("attention_mask") else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, TensorProto.UINT8 if name in codes else kind, shape)

    model = helper.make_model(
        helper.make_graph(
            nodes,
            "nodes",
            [described(name, shape) for name, shape in inputs.items()],
            [described(name, shape) for name, shape in outputs.items()],
        ),
        functions=functions,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def one_node_model(case, opset: int = 23, inline: bool = False, function=None) -> onnx.ModelProto:
    """A model that is nothing but the node and its function, or a form of it."""
    node = make_node(case, input_names(case), ["output", "present"])
    function = function or function_of(case, opset)
    outputs = dict(zip(node.output, result_dimensions(case), strict=True))
    model = make_model([node], [function], dimensions(case), outputs, opset)
    return onnx.inliner.inline_local_functions(model) if inline else model


def run(model: onnx.ModelProto, x) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {name: value.numpy() for name, value in x.items()})]


def check(case, opset: int = 23, inline: bool = False) -> None:
    """Either form, whichever the number of queries would choose."""
    x = case.tensors(torch.float32)
    expected, expected_cache = case.expected(x)
    for form in forms_of(function_of(case, opset)):
        got, cache = run(one_node_model(case, opset, inline, form), x)
        torch.testing.assert_close(got.double(), expected, **CLOSE)
        torch.testing.assert_close(cache.double(), expected_cache, **CLOSE)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind, step):
    new, past = STEPS[step]
    check(replace(KINDS[kind], new=new, past=past))


@given(cases() | cached_cases())
@settings(max_examples=60)
def test_equals_the_reference_for_any_sizes(case):
    check(case)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("op_type", "variant"), EVERY_VARIANT)
def test_every_variant_equals_the_operator(op_type, variant, step):
    new, past = STEPS[step]
    case = replace(case_of(op_type, variant), new=new, past=past)
    x = case.tensors(torch.float32)
    expected = case.operator(**x, **case.settings())
    for inline in (False, True):
        for got, wanted in zip(run(one_node_model(case, inline=inline), x), expected, strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("inline", [None, onnx.inliner.inline_local_functions, InlinePass()])
def test_variants_live_in_one_model(inline):
    """Variants of one function are told apart by ONNX Runtime, by ONNX's inliner and by that of ``onnx_ir``.

    Those with one feature at most, and those with all: ONNX Runtime takes minutes for a model of every one.
    """
    all_cases = [
        case_of(op_type, variant)
        for op_type, variants in VARIANTS.items()
        for variant in variants
        if sum(astuple(variant)) <= 1 or variant == variants[-1]
    ]
    nodes, functions, inputs, outputs, x, expected = [], [], {}, {}, {}, []
    for i, case in enumerate(all_cases):
        shapes, tensors = dimensions(case), case.tensors(torch.float32)
        node = make_node(case, [f"{name}_{i}" for name in shapes], [f"output_{i}", f"present_{i}"])
        nodes.append(node)
        functions.append(function_of(case))
        inputs |= {f"{name}_{i}": shape for name, shape in shapes.items()}
        outputs |= dict(zip(node.output, result_dimensions(case), strict=True))
        x |= {f"{name}_{i}": tensors[name] for name in shapes}
        expected += case.expected(tensors)
    model = make_model(nodes, functions, inputs, outputs)
    if isinstance(inline, InlinePass):
        model = onnx_ir.to_proto(inline(onnx_ir.from_proto(model)).model)
    elif inline:
        model = inline(model)
    assert len(model.functions) == (0 if inline else len(all_cases))
    for got, wanted in zip(run(model, x), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, **CLOSE)


@pytest.mark.parametrize(("op_type", "variant"), EVERY_VARIANT)
def test_a_variant_has_no_more_than_it_needs(op_type, variant):
    function, plain = attention_function(op_type, 23, variant), attention_function(op_type, 23)
    inputs = [name for name in ("sinks", "slopes") if getattr(variant, name)]
    assert [*function.input] == [*plain.input, *(f"{name}_H" for name in inputs)]
    numbers = [name for name in ("key_scales", "value_scales", "softcap", "window") if getattr(variant, name)]
    flags = [*(f"has_{name}" for name in inputs), *(["scaled_rope"] if variant.scaled_rope else [])]
    assert [*function.attribute] == [*plain.attribute, *numbers, *flags]
    assert_all_is_used(function)


def assert_all_is_used(function: onnx.FunctionProto) -> None:
    """Every operation of either form leads to a result: nothing of another variant is left."""
    nodes = list(every_node(function.node))
    used = {name for node in nodes for name in node.input} | {*function.output}
    branches = {a.g.output[0].name for node in nodes for a in node.attribute if a.g.output}
    assert not {node.output[0] for node in nodes} - used - branches


# A row of 28 numbers, keys of 7 and values of 3: (2 * 28 - 10) * 4 heads are saved per query, and 20 * 12 cost once.
@pytest.mark.parametrize(("new", "branch"), [(1, "else_branch"), (2, "then_branch"), (5, "then_branch")])
def test_the_number_of_queries_chooses_the_form(new, branch):
    """Oracle: the form of which nothing but zeros is left gives zeros."""
    case = Case(rank=20, new=new, past=4)
    emptied = onnx.FunctionProto()
    emptied.CopyFrom(function_of(case))
    (choice,) = (node for node in emptied.node if node.op_type == "If")
    (graph,) = (a.g for a in choice.attribute if a.name == branch)
    graph.node[-1].output[0] = "full"
    graph.node.append(helper.make_node("Sub", ["full", "full"], [graph.output[0].name]))
    output, _ = run(one_node_model(case, function=emptied), case.tensors(torch.float32))
    assert not output.any()


def test_there_is_no_scaling_without_scales():
    with pytest.raises(ValueError, match="scaled_rope needs key_scales"):
        attention_function(LATENT, 23, Variant(value_scales=True, scaled_rope=True))


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_inlined_model_equals_the_reference_and_is_standard(kind, opset):
    model = one_node_model(KINDS[kind], opset, inline=True)
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {""}
    check(KINDS[kind], opset, inline=True)


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize(("op_type", "variant"), EVERY_VARIANT)
def test_function_imports_the_wanted_operators(op_type, variant, opset):
    function = attention_function(op_type, opset, variant)
    assert (function.domain, function.name, function.overload) == (DOMAIN, variant.named(op_type), "")
    assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", opset)]
    assert {node.domain for node in function.node} == {""}


@pytest.mark.parametrize("kind", ["window", "everything", "cached, everything"])
def test_sequences_of_padding_alone_are_finite(kind):
    case = replace(KINDS[kind], padding=((0, 7), (7, 0)))
    assert all(y.isfinite().all() for y in run(one_node_model(case), case.tensors(torch.float32)))


@pytest.mark.parametrize("kind", ["grouped", "everything", "cached, everything"])
def test_one_session_serves_every_step(kind):
    """The sizes of prefill and decoding are those of the inputs, not constants of the model."""
    case = replace(KINDS[kind], padding=((0, 0), (2, 0)))
    x = case.tensors(torch.float32)
    model = one_node_model(case)
    whole, _ = run(model, x | {"past": x["past"][:, :0], "attention_mask": x["attention_mask"][:, : case.new]})
    cache, parts = x["past"][:, :0], []
    for place in range(case.new):
        part = {name: x[name][:, place : place + 1] for name in case.PER_TOKEN}
        mask = x["attention_mask"][:, : place + 1]
        output, cache = run(model, x | part | {"past": cache, "attention_mask": mask})
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
