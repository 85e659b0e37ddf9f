"""Bodies with a quantised cache in ONNX Runtime, against the float64 reference over the rows its codes stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from latent_cases import Case, cases
from test_onnx_function import (
    KINDS,
    assert_all_is_used,
    dimensions,
    every_node,
    forms_of,
    input_names,
    make_model,
    make_node,
    variant_of,
)
from test_onnx_static import GARBAGE, room_of, slots_of

from mla_compile.passes.quantise_cache import quantised_row
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_quantised import quantised_bytes
from mla_compile.runtime.onnx_variant import CACHED, LATENT, Variant

# Queries and weights in two digits are off by 1/128^2 of the largest at most, 3e-5, in sums of a few numbers of size 1.
CLOSE = {"rtol": 1e-3, "atol": 3e-4}
NAMES = [name for name, case in KINDS.items() if isinstance(case, Case)]
CASES = {name: KINDS[name] for name in NAMES} | {
    "soft-cap, sinks, slopes": Case(softcap=1.5, sinks=True, slopes=True),
    "soft-cap, sinks, slopes, window": Case(softcap=1.5, sinks=True, slopes=True, window=3),
}
STEPS = {"prefill": (5, 0), "chunk": (3, 4), "decoding": (1, 6), "first token": (1, 0)}
KINDS_OF_CACHE = {"dynamic": False, "static": True}
MIDDLE, LEVELS = (64, 128), (63, 127)


def quantised_function(case, static) -> onnx.FunctionProto:
    return attention_function(LATENT, 24 if static else 23, replace(variant_of(case), static=static, quantised=True))


def norms_of(case) -> int:
    return case.key_scales + case.value_scales


def node_of(case, static, function):
    """A node with a quantised cache, and the dimensions of its inputs and outputs."""
    node = make_node(case, [*input_names(case), "past_scale"], ["output", "present", "present_scale"])
    node.op_type = function.name
    flags = ["quantised", "static"] if static else ["quantised"]
    node.attribute.extend(onnx.helper.make_attribute(name, 1) for name in flags)
    inputs = dimensions(case)
    tokens = inputs["past"][:2]
    inputs |= {"past": [*tokens, case.width - norms_of(case)], "past_scale": [*tokens, 2 + norms_of(case)]}
    kept = inputs["past"][:2] if static else ["B", "T"]
    outputs = {
        "output": ["B", "S", case.heads, case.v_dim],
        "present": [*kept, case.width - norms_of(case)],
        "present_scale": [*kept, 2 + norms_of(case)],
    }
    return node, inputs, outputs


def session_of(case, static, function) -> onnxruntime.InferenceSession:
    """One node with a quantised cache."""
    node, inputs, outputs = node_of(case, static, function)
    model = make_model([node], [function], inputs, outputs, 24 if static else 23, codes=("past", "present"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def decoded(case, codes, scales) -> torch.Tensor:
    """Rows, with norms behind what codes stand for."""
    parts = [case.rank, codes.shape[-1] - case.rank]
    numbers = (codes - np.repeat(MIDDLE, parts)) * np.repeat(scales[..., :2].astype(np.float64), parts, 2)
    return torch.from_numpy(np.concatenate([numbers, scales[..., 2:]], -1))


def rotated(case, rows, cos, sin) -> torch.Tensor:
    """Rows with their rope keys rotated; back again with ``-sin``."""
    rope = 2 * case.half * case.rope_groups
    latent, keys, norms = rows.split([case.rank, rope, norms_of(case)], -1)
    real, imaginary = keys.unflatten(2, (case.rope_groups, 2, case.half)).unbind(3)
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], 3)
    return torch.cat([latent, turned.flatten(2), norms], 2)


def check(case, static) -> None:
    for form in forms_of(quantised_function(case, static)):
        check_form(case, static, session_of(case, static, form))


def exactly(output, case, x) -> None:
    expected, _ = case.expected(x)
    torch.testing.assert_close(output, expected, **CLOSE)


def check_form(case, static, session, compare=exactly, scale=(0.005, 0.02)) -> None:
    """New rows are the nearest codes, and what is attended to is exactly what codes stand for."""
    x, random = case.tensors(), np.random.default_rng(case.seed)
    batch, past, _ = x["past"].shape
    width, norms = case.width - norms_of(case), norms_of(case)
    x["row"][..., width:].sigmoid_()  # norms are positive: weights that are multiplied with them stay so
    codes = random.integers(1, 128, (batch, past, width)).astype(np.uint8)
    codes[..., case.rank :] = random.integers(1, 256, (batch, past, width - case.rank))
    scales = random.uniform(*scale, (batch, past, 2)).astype(np.float32)
    scales = np.concatenate([scales, random.uniform(0, 1, (batch, past, norms)).astype(np.float32)], -1)
    fed = {
        name: value.numpy().astype(np.float32) if value.is_floating_point() else value.numpy()
        for name, value in x.items()
    }
    room = room_of(case)
    before, after = (
        slots_of(case, tokens, room) if static else slice(None) for tokens in (case.past, case.past + case.new)
    )
    if static:
        memory = np.full((batch, room, width), 255, np.uint8), np.full((batch, room, 2 + norms), GARBAGE, np.float32)
        memory[0][:, before], memory[1][:, before] = codes, scales
    else:
        memory = codes, scales
    output, present, present_scale = session.run(None, fed | {"past": memory[0], "past_scale": memory[1]})

    present, present_scale = present[:, after], present_scale[:, after]
    kept = min(case.new, present.shape[1])  # of a window's rows, the last
    old = present.shape[1] - kept
    np.testing.assert_array_equal(present[:, :old], codes[:, past - old :])
    np.testing.assert_array_equal(present_scale[:, :old], scales[:, past - old :])
    exact = rotated(case, x["row"], x["cos"], x["sin"])[:, case.new - kept :]
    for part, levels, middle, index in (
        (slice(0, case.rank), LEVELS[0], MIDDLE[0], 0),
        (slice(case.rank, width), LEVELS[1], MIDDLE[1], 1),
    ):
        if part.start == width:
            continue
        wanted, scale = exact[..., part], present_scale[:, old:, index : index + 1]
        np.testing.assert_allclose(scale * levels, wanted.abs().amax(-1, keepdim=True), rtol=1e-5)
        steps = present[:, old:, part].astype(np.int64) - middle
        assert np.abs(steps).max(initial=0) <= levels
        assert (np.abs(steps * scale - wanted.numpy()) <= scale * 0.5001).all()

    np.testing.assert_array_equal(present_scale[:, old:, 2:], exact[..., width:].numpy().astype(np.float32))

    # The codes of rows that a window did not keep are made here, from rows whose numbers round but one way.
    row = quantised_row(x["row"], x["cos"], x["sin"], case.rank)
    own = decoded(case, present[:, old:], present_scale[:, old:])
    row[:, case.new - kept :] = rotated(case, own, x["cos"][:, case.new - kept :], -x["sin"][:, case.new - kept :])
    compare(torch.from_numpy(output).double(), case, x | {"past": decoded(case, codes, scales), "row": row})


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("static", KINDS_OF_CACHE.values(), ids=KINDS_OF_CACHE)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_over_what_codes_stand_for(name, static, step):
    new, past = STEPS[step]
    case = replace(CASES[name], new=new, past=past)
    if not (static and case.window == 1):
        check(case, static)


@given(cases())
@settings(max_examples=30)
def test_equals_the_reference_for_any_sizes(case):
    check(case, False)
    assume(case.window != 1)
    check(case, True)


@pytest.mark.parametrize("static", KINDS_OF_CACHE.values(), ids=KINDS_OF_CACHE)
@pytest.mark.parametrize("name", ["grouped", "window"])
def test_there_is_no_more_in_a_variant_than_it_needs(name, static):
    assert_all_is_used(quantised_function(CASES[name], static))


def test_the_cache_is_never_multiplied_as_floats_in_decoding():
    """The folded form has two products of bytes for scores, one for sums, and the others are of small matrices."""
    (choice,) = (node for node in quantised_function(Case(), True).node if node.op_type == "If")
    (folded,) = (a.g for a in choice.attribute if a.name == "else_branch")
    kinds = [node.op_type for node in every_node(folded.node)]
    assert (kinds.count("MatMulInteger"), kinds.count("MatMul")) == (3, 2)


@pytest.mark.parametrize(
    ("op_type", "variant"),
    [
        (CACHED, Variant(quantised=True)),
        (LATENT, Variant(quantised=True, bidirectional=True)),
    ],
)
def test_what_cannot_be_quantised(op_type, variant):
    with pytest.raises(ValueError, match="quantised cache is of causal latent attention"):
        attention_function(op_type, 24, variant)


def test_rows_stand_for_what_they_stand_for():
    """Quantising twice is quantising once, whatever the angles and however cos and sin are stretched."""
    case = Case(new=5)
    x = case.tensors()
    angles = {"cos": 1.3 * x["cos"], "sin": 1.3 * x["sin"]}
    once = quantised_row(x["row"], **angles, rank=case.rank)
    assert (once - x["row"]).abs().max() > 1e-3
    torch.testing.assert_close(quantised_row(once, **angles, rank=case.rank), once, rtol=0, atol=1e-12)


def test_bytes_of_a_row():
    assert quantised_bytes([160, 20, 30], [0, 0, 4]) == 160 + 8 + 20 + 8 + 26 + 8 + 4 * 4
