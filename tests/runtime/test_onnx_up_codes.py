"""Up-projections as codes: what they stand for, and nodes that take them, with the fused kernel and without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import test_fused_cpu
import test_onnx_quantised
import torch
from latent_cases import Case
from onnx import TensorProto, helper
from test_fused_cpu import LONG_WITH_SCALES, SHORT, library, older
from test_onnx_function import assert_all_is_used, dimensions, forms_of, input_names, make_node, variant_of

from mla_compile.runtime.cpu import library as compiling
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_up_codes import KEY_AXIS, LEVELS, VALUE_AXIS, codes_and_scales
from mla_compile.runtime.onnx_variant import CACHED, FUSED_DOMAIN, LATENT, PLAIN, Variant, variant_named

__all__ = ["library", "older"]  # fixtures

pytestmark = pytest.mark.skipif(compiling.compiler() is None, reason="there is no C++ compiler")
UPS = {"key_up": KEY_AXIS, "value_up": VALUE_AXIS}


class CodedCase(Case):
    """A problem whose up-projections are what codes stand for, and latent channels are very unequal."""

    def adapt(self, tensors):
        tensors = super().adapt(tensors)
        sizes = torch.logspace(-3, 1, self.rank, dtype=torch.float64)
        tensors["key_up"] *= sizes
        tensors["value_up"] *= sizes.flip(0)[:, None]
        for name, axis in UPS.items():
            codes, scales = codes_and_scales(tensors[name].numpy(), axis)
            tensors[name] = torch.from_numpy(codes * scales)
        return tensors


class CodedSession:
    """A session that is given up-projections and takes their codes."""

    def __init__(self, session) -> None:
        self._session = session

    def run(self, outputs, given):
        coded = dict(given)
        for name, axis in UPS.items():
            coded[name], coded[f"{name}_scale"] = codes_and_scales(given[name], axis)
        return self._session.run(outputs, coded)


def coded(case):
    return CodedCase(**vars(case))


def opened(library, case, function, node, inputs, outputs, **kinds):
    """A session of a node, which gets what it has for codes."""
    node.op_type = function.name
    node.input.extend(f"{name}_scale" for name in UPS)
    node.attribute.append(helper.make_attribute("coded_up", 1))
    scales = {"key_up_scale": [case.up_groups, 1, case.rank], "value_up_scale": [case.up_groups, case.rank, 1]}
    session = test_fused_cpu.session_of(library, node, function, inputs | scales, outputs, signed=UPS, **kinds)
    return CodedSession(session)


def functions(case, fused, **features):
    variant = replace(variant_of(case), coded_up=True, **features)
    opset = 24 if variant.static else 23
    return forms_of(attention_function(LATENT, opset, variant, fused=fused))


def check_growing(library, case, function):
    node = make_node(case, input_names(case), ["output", "present"])
    outputs = {"output": ["B", "S", case.heads, case.v_dim], "present": ["B", "T", case.width]}
    session = opened(library, case, function, node, dimensions(case), outputs)
    x = case.tensors(torch.float32)
    got, cache = session.run(None, {name: value.numpy() for name, value in x.items()})
    expected, rows = case.expected(case.tensors())
    torch.testing.assert_close(torch.from_numpy(got).double(), expected, **test_fused_cpu.CLOSE)
    torch.testing.assert_close(torch.from_numpy(cache).double(), rows, **test_fused_cpu.CLOSE)


@pytest.mark.parametrize("fused", [False, True], ids=["standard", "fused"])
@pytest.mark.parametrize("step", test_fused_cpu.STEPS)
@pytest.mark.parametrize("kind", SHORT)
def test_equals_the_reference(library, kind, step, fused):
    case = coded(replace(SHORT[kind], new=test_fused_cpu.STEPS[step][0], past=test_fused_cpu.STEPS[step][1]))
    for form in functions(case, fused):
        check_growing(library, case, form)


@pytest.mark.parametrize("kind", LONG_WITH_SCALES)
def test_equals_the_reference_over_many_tokens(library, kind):
    case = coded(LONG_WITH_SCALES[kind])
    if not case.slopes:  # which are ALiBi's in a class of their own
        check_growing(library, case, functions(case, True)[1])


@pytest.mark.parametrize("kind", ["a block and a bit", "many sequences", "key scales, many heads"])
def test_equals_the_reference_without_the_widest_registers(older, kind):
    case = coded(LONG_WITH_SCALES[kind])
    check_growing(older, case, functions(case, True)[1])


@pytest.mark.parametrize("fused", [False, True], ids=["standard", "fused"])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("kind", ["grouped", "no rope", "all rope", "key and value scales", "sinks", "window"])
def test_beside_a_cache_of_codes(library, kind, static, fused):
    case = coded(replace(SHORT[kind], new=2, past=5))
    for form in functions(case, fused, quantised=True, static=static):
        node, inputs, outputs = test_onnx_quantised.node_of(case, static, form)
        session = opened(library, case, form, node, inputs, outputs, codes=("past", "present"))
        # Latent channels are so unequal that those rounded most may be all there is.
        compare = test_fused_cpu.within(0.03) if fused else test_onnx_quantised.exactly
        test_onnx_quantised.check_form(case, static, session, compare)


@pytest.mark.parametrize("kind", ["grouped", "key and value scales", "soft-cap, sinks, slopes, window"])
def test_beside_a_cache_in_halves(library, kind):
    case = coded(replace(SHORT[kind], new=2, past=5))
    width = (case.width + 1) // 2
    halves = {f"past_{part}": ["B", 1, "P", width] for part in ("key", "value")}
    others = {name: shape for name, shape in dimensions(case).items() if name != "past"}
    names = [name for first in input_names(case) for name in (halves if first == "past" else [first])]
    present = {f"present_{part}": ["B", 1, "T", width] for part in ("key", "value")}
    outputs = {"output": ["B", "S", case.heads, case.v_dim], **present}
    for form in functions(case, True, halves=True):
        node = make_node(case, names, [*outputs])
        node.attribute.append(helper.make_attribute("halves", 1))
        session = opened(library, case, form, node, others | halves, outputs)
        test_fused_cpu.check_pairs(case, session, width)


@pytest.mark.parametrize("kind", ["grouped", "no rope", "key and value scales", "sinks"])
def test_in_float16(library, kind):
    case = coded(replace(SHORT[kind], new=2, past=5))
    variant = replace(variant_of(case), coded_up=True)
    inputs = dimensions(case)
    outputs = {"output": ["B", "S", case.heads, case.v_dim], "present": ["B", "T", case.width]}
    halves = {*inputs, *outputs, *(f"{name}_scale" for name in UPS)} - {"attention_mask", "cos", "sin", *UPS}
    for form in forms_of(attention_function(LATENT, 23, variant, fused=True, float16=True)):
        node = make_node(case, input_names(case), list(outputs))
        test_fused_cpu.check_halves(case, opened(library, case, form, node, inputs, outputs, halves=halves))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("axis", [KEY_AXIS, VALUE_AXIS])
def test_codes_are_next_to_their_numbers(axis, dtype):
    """By no more than half a step, and float16's own rounding of it, 2^-11 of 127 steps."""
    random = np.random.default_rng(0)
    up = random.standard_normal((2, 5, 7)).astype(dtype)
    up[:, 1] *= 1e-3
    up[..., 2] = 0
    codes, scales = codes_and_scales(up, axis)
    assert codes.dtype == np.int8
    assert scales.dtype == dtype
    assert scales.shape == tuple(1 if i == axis else size for i, size in enumerate(up.shape))
    steps = 0.5 + (0.04 if dtype == np.float16 else 1e-4)
    assert (np.abs(codes * scales.astype(np.float64) - up) <= steps * scales.astype(np.float64)).all()
    nonzero = np.abs(up).max(axis) > 0
    assert (np.abs(codes).max(axis)[nonzero] == LEVELS).all()


def test_a_variant_has_no_more_than_it_needs():
    function, plain = attention_function(LATENT, 23, Variant(coded_up=True)), attention_function(LATENT, 23)
    renamed = {"key_up_GDr": "key_code_GDr", "value_up_GrV": "value_code_GrV"}
    names = [renamed.get(name, name) for name in plain.input]
    assert [*function.input] == [*names, "key_scale_G1r", "value_scale_Gr1"]
    assert [*function.attribute] == [*plain.attribute, "coded_up"]
    assert_all_is_used(function)


@pytest.mark.parametrize(("op_type", "variant"), [(CACHED, PLAIN), (LATENT, Variant(bidirectional=True))])
def test_what_has_no_up_projections_or_encodes_is_refused(op_type, variant):
    with pytest.raises(ValueError, match="Codes of up-projections"):
        attention_function(op_type, 23, replace(variant, coded_up=True))


@pytest.mark.parametrize("variant", [PLAIN, Variant(key_scales=True, static=True), Variant(slopes=True, coded_up=True)])
def test_a_variant_is_known_by_its_name(variant):
    assert variant_named(LATENT, variant.named(LATENT)) == variant
    assert variant_named(CACHED, variant.named(LATENT)) is None
    assert variant_named(LATENT, f"{variant.named(LATENT)}_more") is None


def run_operator(library, **inputs):
    """``FoldedAttention`` by itself."""
    shapes = {n: np.ones(s, bool if n == "seen" else np.float32) for n, s in test_fused_cpu.OPERANDS.items()}
    given = shapes | inputs
    order = [*test_fused_cpu.OPERANDS, "", "", "", "", "key_scale", "value_scale"]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in given.items()}
    described = [helper.make_tensor_value_info(n, kind, ["?"] * given[n].ndim) for n, kind in kinds.items()]
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["?"] * 4)
    names = [name if name in given else "" for name in order]
    node = helper.make_node("FoldedAttention", names, ["output"], domain=FUSED_DOMAIN)
    model = helper.make_model(
        helper.make_graph([node], "operator", described, [result]),
        opset_imports=[helper.make_opsetid(FUSED_DOMAIN, 1)],
        ir_version=10,
    )
    return test_fused_cpu.opened(library, model).run(None, given)[0]


def test_what_does_not_fit_is_refused(library):
    codes = {"key_up": np.ones((2, 3, 5), np.int8), "value_up": np.ones((2, 5, 3), np.int8)}
    scales = {"key_scale": np.ones((2, 1, 5), np.float32), "value_scale": np.ones((2, 5, 1), np.float32)}
    np.testing.assert_array_equal(run_operator(library, **codes, **scales), run_operator(library))
    halves = {name: array.astype(np.float16) for name, array in codes.items()}
    np.testing.assert_array_equal(run_operator(library, **halves), run_operator(library))
    with pytest.raises(Exception, match="there are no scales of key up-projections, which are int8"):
        run_operator(library, **codes, value_scale=scales["value_scale"])
    with pytest.raises(Exception, match="the sizes of scales of value up-projections do not fit"):
        run_operator(library, **codes, key_scale=scales["key_scale"], value_scale=np.ones((2, 1, 3), np.float32))
    with pytest.raises(Exception, match="key up-projections are neither float32, float16 nor int8"):
        run_operator(library, key_up=np.ones((2, 3, 5), np.float64))
