"""The fused kernel for processors in ONNX Runtime: against the operator and the reference, and in whole models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import test_onnx_quantised
import test_onnx_session
import test_onnx_static
import torch
from conftest import Captured
from families.huggingface import CONVERTIBLE
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from latent_cases import Case, cases
from onnx import TensorProto, helper
from test_onnx_function import KINDS, dimensions, forms_of, input_names, make_node, variant_of

from mla_compile.artifacts.fuse import write_fused
from mla_compile.cli import main
from mla_compile.errors import LoadError, RefusedError, UsageError
from mla_compile.runtime.cpu import library as compiling
from mla_compile.runtime.cpu.fused import fused_model
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.onnx_variant import CACHED, DOMAIN, FUSED_DOMAIN, LATENT, VERSION, Variant
from mla_compile.sources.capture import capture

pytestmark = pytest.mark.skipif(compiling.compiler() is None, reason="there is no C++ compiler")

STEPS = {"prefill": (5, 0), "chunk": (3, 4), "decoding": (1, 6), "first token": (1, 0)}
SHORT = {name: case for name, case in KINDS.items() if isinstance(case, Case)} | {
    "soft-cap": Case(softcap=1.5),
    "sinks": Case(sinks=True),
    "slopes": Case(slopes=True),
    "soft-cap, sinks, slopes, window": Case(softcap=1.5, sinks=True, slopes=True, window=3),
}
OF_CODES = [name for name, case in SHORT.items() if case.window != 1]


class Sloped(Case):
    """With ALiBi's slopes (Press et al. 2022): what is far away loses, or logits are thousands, and their roundings."""

    def adapt(self, tensors):
        if not self.slopes:
            return super().adapt(tensors)
        slopes = 2.0 ** (-8 * (torch.arange(self.heads, dtype=torch.float64) + 1) / self.heads)
        return super().adapt(tensors) | {"slopes": slopes}


# Scores of real models are of size 10 at most. Blocks are of 48 and of 96 tokens and a split of 1024, tiles of 32
# queries, of 64 channels, and of 4 and 6 tokens.
LONG = {
    "a block and a bit": Case(
        scale=0.05, heads=8, rank=70, nope=9, half=3, v_dim=17, past=60, new=1, padding=((0, 0), (50, 0))
    ),
    "two splits, many heads": Case(
        scale=0.05, heads=36, rope_groups=1, up_groups=12, rank=64, nope=16, half=8, v_dim=32, past=1300, new=1
    ),
    "many sequences": Case(
        scale=0.05, batch=11, heads=12, up_groups=6, rank=70, nope=9, v_dim=37, past=60, new=1, padding=((0, 0),) * 11
    ),
    "hidden blocks": Case(scale=0.05, heads=6, rank=20, past=400, new=2, padding=((0, 0), (310, 0))),
    "new tokens in two tiles": Case(scale=0.05, heads=12, rope_groups=4, up_groups=3, rank=33, past=150, new=7),
    "soft-cap, sinks, slopes": Sloped(
        scale=0.05, heads=12, rank=40, past=1100, new=2, padding=((0, 0), (70, 0)), softcap=2.0, sinks=True, slopes=True
    ),
    "soft-cap, window": Case(scale=0.05, heads=36, rank=20, past=260, new=3, softcap=2.0, window=150),
}
LONG_WITH_SCALES = LONG | {
    "key scales, many heads": Case(
        scale=0.05, heads=36, rope_groups=2, up_groups=12, rank=64, nope=16, past=1100, new=1, key_scales=12
    ),
    "scaled rope, value scales, two tiles": Case(
        scale=0.05, heads=24, rank=33, past=150, new=3, key_scales=8, value_scales=3, scaled_rope=True
    ),
    "everything": Sloped(
        scale=0.05,
        heads=12,
        rank=33,
        past=260,
        new=2,
        padding=((0, 0), (70, 0)),
        key_scales=4,
        value_scales=12,
        softcap=2.0,
        sinks=True,
        slopes=True,
        window=150,
    ),
}
CPU_FLAGS = Path("/proc/cpuinfo")
MULTIPLIES_BYTES = CPU_FLAGS.exists() and " avx512_vnni" in CPU_FLAGS.read_text()
# Sums over as many tokens add up as many roundings of float32: 1e-6 was observed.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def with_digits(case, x):
    """The problem with queries of latents as the kernel rounds them where processors multiply bytes: of 127 levels."""
    plain, turned = x["query"].split([case.nope, 2 * case.half], -1)
    per_head = x["key_up"].repeat_interleave(case.heads // case.up_groups, 0)
    latent = torch.einsum("bshd,hdr->bshr", plain, per_head)
    unit = latent.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
    query = torch.cat([(latent / unit).round() * unit, turned], -1)
    return x | {"query": query, "key_up": torch.eye(case.rank, dtype=query.dtype)[None]}


def within(share):
    """A comparison with what rounded queries make, up to such a share of the largest output."""

    def compare(output, case, x) -> None:
        if not MULTIPLIES_BYTES:
            test_onnx_quantised.exactly(output, case, x)
            return
        expected, _ = case.expected(with_digits(case, x))
        torch.testing.assert_close(output, expected, rtol=0, atol=share * expected.abs().max().item())

    return compare


# Weights of 254 levels: 1.2 % was seen, where a few of hundreds of random rows have most of the weight.
nearly = within(0.02)


@pytest.fixture(scope="module")
def library():
    return compiling.library()


def fused_form(case, opset=24, **cache):
    """The function with the folded form alone, which is the fused one."""
    unfolded, fused = forms_of(attention_function(LATENT, opset, replace(variant_of(case), **cache), fused=True))
    assert [node.domain for node in fused.node].count(FUSED_DOMAIN) == 2
    assert [node.domain for node in unfolded.node].count(FUSED_DOMAIN) == 1
    return fused


def session_of(library, node, function, inputs, outputs, codes=(), halves=(), threads=1, signed=()):
    kinds = {"attention_mask": TensorProto.INT64} | dict.fromkeys(signed, TensorProto.INT8)
    kinds |= dict.fromkeys(codes, TensorProto.UINT8) | dict.fromkeys(halves, TensorProto.FLOAT16)

    def described(name, shape):
        return helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)

    graph = helper.make_graph(
        [node], "node", *([described(n, s) for n, s in named.items()] for named in (inputs, outputs))
    )
    domains = (("", 24), (DOMAIN, VERSION), (FUSED_DOMAIN, 1))
    imports = [helper.make_opsetid(*domain) for domain in domains]
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)
    return opened(library, model, threads)


def opened(library, model, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def static_session(library, case, threads=1):
    function = fused_form(case, static=True)
    node, inputs, outputs = test_onnx_static.node_of(case, function)
    return session_of(library, node, function, inputs, outputs, threads=threads)


def code_session(library, case, static, threads=1):
    function = fused_form(case, static=static, quantised=True)
    node, inputs, outputs = test_onnx_quantised.node_of(case, static, function)
    return session_of(library, node, function, inputs, outputs, ("past", "present"), threads=threads)


def check_growing(library, case, function, threads=1):
    x = case.tensors(torch.float32)
    inputs = dimensions(case)
    node = make_node(case, input_names(case), ["output", "present"])
    outputs = {"output": ["B", "S", case.heads, case.v_dim], "present": ["B", "T", case.width]}
    session = session_of(library, node, function, inputs, outputs, threads=threads)
    got, cache = session.run(None, {name: value.numpy() for name, value in x.items()})
    expected, rows = case.expected({n: v.double() if v.is_floating_point() else v for n, v in x.items()})
    torch.testing.assert_close(torch.from_numpy(got).double(), expected, **CLOSE)
    torch.testing.assert_close(torch.from_numpy(cache).double(), rows, **CLOSE)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", SHORT)
def test_equals_the_reference(library, kind, step):
    """Both forms: of soft-caps, sinks and slopes there is an unfolded one beside the fused kernel alone."""
    case = replace(SHORT[kind], new=STEPS[step][0], past=STEPS[step][1])
    for form in forms_of(attention_function(LATENT, 23, variant_of(case), fused=True)):
        check_growing(library, case, form)
    if case.window != 1:
        test_onnx_static.check_form(case, static_session(library, case))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", LONG_WITH_SCALES)
def test_equals_the_reference_over_many_tokens(library, kind, threads):
    case = LONG_WITH_SCALES[kind]
    test_onnx_static.check_form(case, static_session(library, case, threads))
    check_growing(library, case, fused_form(case, 23), threads)


@given(cases(), st.sampled_from([1, 2]))
@settings(max_examples=60)
def test_equals_a_cache_that_grows_for_any_sizes(case, threads):
    assume(case.window != 1)
    test_onnx_static.check_form(case, static_session(compiling.library(), case, threads))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", OF_CODES)
def test_is_near_the_reference_over_what_codes_stand_for(library, kind, step):
    case = replace(SHORT[kind], new=STEPS[step][0], past=STEPS[step][1])
    test_onnx_quantised.check_form(case, True, code_session(library, case, True), nearly)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", LONG_WITH_SCALES)
def test_is_near_the_reference_over_what_many_codes_stand_for(library, kind, threads):
    case = LONG_WITH_SCALES[kind]
    # With slopes the new tokens, which are nearest, have most of the weight, and theirs is the scale that others' is
    # rounded in: they are to have about the same, as those of a model have.
    scale = (0.03, 0.06) if case.slopes else (0.005, 0.02)
    for static in (False, True):
        session = code_session(library, case, static, threads)
        test_onnx_quantised.check_form(case, static, session, nearly, scale)


@pytest.fixture(scope="module", params=["x86-64-v3", "x86-64"], ids=["AVX2", "portable"])
def older(tmp_path_factory, request):
    """The library for processors without products of bytes, which decode codes; the portable one is that of ARM too."""
    if not (CPU_FLAGS.exists() and " avx2" in CPU_FLAGS.read_text()):
        pytest.skip("this is no x86-64 processor with AVX2, or its kind is not known")
    out = tmp_path_factory.mktemp("older") / "library.so"
    compiling.compile_library(out, f"-march={request.param}")
    return out


@pytest.mark.parametrize("kind", LONG_WITH_SCALES)
def test_codes_are_exact_where_they_are_decoded(older, kind):
    case = LONG_WITH_SCALES[kind]
    test_onnx_quantised.check_form(case, True, code_session(older, case, True))


@pytest.mark.parametrize("kind", ["a block and a bit", "soft-cap, sinks, slopes", "everything"])
def test_numbers_are_exact_without_the_widest_registers(older, kind):
    """By vectors of eight or four numbers, not of sixteen."""
    case = LONG_WITH_SCALES[kind]
    width = (case.width + 1) // 2
    check_pairs(case, pair_session(older, case, pair_forms(case)[1], width), width)
    check_halves(case, half_session(older, case, half_forms(case)[1]))
    test_onnx_static.check_form(case, static_session(older, case))
    check_growing(older, case, fused_form(case, 23))


@pytest.mark.parametrize("kind", [name for name, case in LONG_WITH_SCALES.items() if not case.value_scales])
def test_equal_weights_are_exact(library, kind):
    """No row is left out or counted twice: of equal weights, only those of the new rows, which have smaller scales, are
    rounded. Norms of values would make them unequal."""
    case = replace(LONG_WITH_SCALES[kind], scale=1e-9, slopes=False)
    check = test_onnx_quantised.check_form
    check(case, True, code_session(library, case, True), within(0.001), scale=(0.06, 0.06))


def half_session(library, case, form, threads=1):
    inputs = dimensions(case)
    outputs = {"output": ["B", "S", case.heads, case.v_dim], "present": ["B", "T", case.width]}
    node = make_node(case, input_names(case), list(outputs))
    halves = {*inputs, *outputs} - {"attention_mask", "cos", "sin"}
    return session_of(library, node, form, inputs, outputs, halves=halves, threads=threads)


def half_forms(case):
    return forms_of(attention_function(LATENT, 23, variant_of(case), fused=True, float16=True))


def check_halves(case, session):
    """What is given and what comes out are rounded by 2^-11, and a few roundings lie between: 1e-3 was seen."""
    x = {n: v if n in ("attention_mask", "cos", "sin") else v.half() for n, v in case.tensors(torch.float32).items()}
    got, cache = (torch.from_numpy(y).double() for y in session.run(None, {n: v.numpy() for n, v in x.items()}))
    expected, rows = case.expected({n: v.double() if v.is_floating_point() else v for n, v in x.items()})
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-3 * expected.abs().max().item())
    torch.testing.assert_close(cache, rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", SHORT)
def test_halves_are_near_the_reference(library, kind):
    case = replace(SHORT[kind], new=2, past=5)
    for form in half_forms(case):
        check_halves(case, half_session(library, case, form))


@pytest.mark.parametrize("kind", LONG_WITH_SCALES)
def test_many_halves_are_near_the_reference(library, kind):
    case = LONG_WITH_SCALES[kind]
    check_halves(case, half_session(library, case, half_forms(case)[1], threads=2))


def pair_session(library, case, form, width, threads=1):
    """A node whose cache is two tensors, of halves of rows."""
    halves = {f"past_{kind}": ["B", 1, "P", width] for kind in ("key", "value")}
    others = {name: shape for name, shape in dimensions(case).items() if name != "past"}
    names = [name for first in input_names(case) for name in (halves if first == "past" else [first])]
    present = {f"present_{kind}": ["B", 1, "T", width] for kind in ("key", "value")}
    outputs = {"output": ["B", "S", case.heads, case.v_dim], **present}
    node = make_node(case, names, [*outputs])
    node.op_type = form.name
    node.attribute.append(helper.make_attribute("halves", 1))
    return session_of(library, node, form, others | halves, outputs, threads=threads)


def pair_forms(case):
    return forms_of(attention_function(LATENT, 23, replace(variant_of(case), halves=True), fused=True))


def check_pairs(case, session, width):
    """Behind a row's own numbers there are others, as before rows that a window shows: nothing reads them."""
    x = case.tensors(torch.float32)
    hidden = x["attention_mask"].shape[1] - case.new - x["past"].shape[1]
    past = torch.nn.functional.pad(x.pop("past"), (0, 2 * width - case.width, hidden, 0), value=7.0)
    given = x | {f"past_{name}": half for name, half in zip(("key", "value"), past[:, None].chunk(2, -1), strict=True)}
    got, *halves = session.run(None, {name: value.numpy() for name, value in given.items()})
    exact = {n: v.double() if v.is_floating_point() else v for n, v in case.tensors(torch.float32).items()}
    expected, rows = case.expected(exact)
    torch.testing.assert_close(torch.from_numpy(got).double(), expected, **CLOSE)
    written = torch.from_numpy(np.concatenate(halves, -1))[:, 0].double()
    new = min(case.new, rows.shape[1])  # a window keeps fewer
    torch.testing.assert_close(
        written[:, written.shape[1] - new :, : case.width], rows[:, rows.shape[1] - new :], **CLOSE
    )
    assert not written[:, -case.new :, case.width :].any()


@pytest.mark.parametrize("more", [0, 3, 40], ids=["as wide", "some wider", "twice as wide"])
@pytest.mark.parametrize("kind", SHORT)
def test_halves_of_rows_equal_the_reference(library, kind, more):
    """A layer's rows may be shorter than those of others, down to less than a half of theirs."""
    case = replace(SHORT[kind], new=2, past=5)
    width = (case.width + 1) // 2 + more
    for form in pair_forms(case):
        check_pairs(case, pair_session(library, case, form, width), width)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", LONG_WITH_SCALES)
def test_halves_of_many_rows_equal_the_reference(library, kind, threads):
    case = LONG_WITH_SCALES[kind]
    width = (case.width + 1) // 2
    check_pairs(case, pair_session(library, case, pair_forms(case)[1], width, threads), width)


@pytest.mark.parametrize("rank", [7, 64])
def test_every_half_is_read_as_it_is(library, rank):
    """A token by itself has the weight of one, and its latent is the output. So few are read one by one, more in
    vectors."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = np.random.default_rng(0).permutation(every[np.isfinite(every)])
    latents = np.resize(every, (-(-len(every) // rank), rank))
    case = Case(
        batch=len(latents),
        new=1,
        past=0,
        heads=1,
        rope_groups=1,
        up_groups=1,
        half=0,
        rank=rank,
        v_dim=rank,
        padding=(),
    )
    session = half_session(library, case, half_forms(case)[1])
    x = {name: np.zeros([n if isinstance(n, int) else 1 for n in shape]) for name, shape in dimensions(case).items()}
    x = {
        name: np.zeros((len(latents), *value.shape[1:])) if name not in ("key_up", "value_up") else value
        for name, value in x.items()
    }
    x |= {"row": latents[:, None], "past": np.zeros((len(latents), 0, rank)), "value_up": np.eye(rank)[None]}
    kinds = {"attention_mask": np.int64, "cos": np.float32, "sin": np.float32}
    got, _ = session.run(None, {name: value.astype(kinds.get(name, np.float16)) for name, value in x.items()})
    np.testing.assert_array_equal(got[:, 0, 0], latents)


def test_sequences_of_nothing_but_padding_attend_to_themselves(library):
    case = Case(past=60, new=2, padding=((0, 0), (62, 0)))
    test_onnx_static.check_form(case, static_session(library, case))


@pytest.mark.parametrize("kind", ["plain", "slopes"])
def test_one_mask_is_every_sequences(library, kind):
    """As standard operators take it, to which the sizes that are told at run time may be anything."""
    case = replace({"plain": Case(), **SHORT}[kind], batch=3, padding=((0, 0),) * 3)
    x = {name: value.numpy() for name, value in case.tensors(torch.float32).items()}
    outputs = {"output": ["B", "S", case.heads, case.v_dim], "present": ["B", "T", case.width]}
    node = make_node(case, input_names(case), ["output", "present"])
    function = fused_form(case, 23)
    session = session_of(library, node, function, dimensions(case), outputs)
    (expected, _), (got, _) = (
        session.run(None, given) for given in (x, x | {"attention_mask": x["attention_mask"][:1]})
    )
    np.testing.assert_array_equal(got, expected)


OPERANDS = {
    "plain": (2, 1, 4, 3),
    "turned": (2, 1, 2, 2, 4),
    "rows": (2, 5, 13),
    "seen": (2, 1, 5),
    "key_up": (2, 3, 5),
    "value_up": (2, 5, 3),
}


PAIRED = {"rows": (2, 1, 5, 7), "second halves": (2, 1, 5, 7)}


def operator(library, shapes, name="FoldedAttention"):
    """An operator by itself, of inputs that are zeros and see everything."""
    kinds = {"seen": TensorProto.BOOL}
    given = [
        helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), [None] * len(s)) for n, s in shapes.items()
    ]
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph(
        [helper.make_node(name, [*shapes], ["output"], domain=FUSED_DOMAIN)], "operator", given, [result]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(FUSED_DOMAIN, 1)], ir_version=10)
    dtypes = {"seen": bool}
    return opened(library, model).run(None, {n: np.ones(s, dtypes.get(n, np.float32)) for n, s in shapes.items()})[0]


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("rows", (1, 5, 13), "rows"),
        ("rows", (2, 5, 12), "rows"),
        ("seen", (2, 1, 4), "mask"),
        ("seen", (3, 1, 5), "mask"),
        ("turned", (1, 1, 2, 2, 4), "turned queries"),
        ("turned", (2, 1, 4, 4), "turned queries"),
        ("rows", (2, 1, 5, 13), "rows"),
        ("key_up", (2, 15), "key up-projections"),
        ("key_up", (2, 4, 5), "key up-projections"),
        ("value_up", (2, 4, 3), "value up-projections"),
    ],
)
def test_what_would_be_read_past_its_end_is_refused(library, name, shape, words):
    assert operator(library, OPERANDS).shape == (2, 1, 4, 3)
    with pytest.raises(Exception, match=f"the sizes of {words} do not fit the others"):
        operator(library, OPERANDS | {name: shape})


@pytest.mark.parametrize(
    ("name", "shape"), [("key_up", (3, 3, 5)), ("value_up", (0, 5, 3)), ("turned", (2, 1, 3, 1, 4))]
)
def test_groups_that_do_not_divide_the_heads_are_refused(library, name, shape):
    with pytest.raises(Exception, match=r"4 heads are no whole number for each of \d groups"):
        operator(library, OPERANDS | {name: shape})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rows", (2, 1, 5, 6)),
        ("rows", (1, 1, 5, 7)),
        ("rows", (2, 2, 5, 7)),
        ("second halves", (2, 1, 5, 8)),
        ("second halves", (2, 1, 4, 7)),
    ],
)
def test_what_would_be_read_past_the_end_of_halves_is_refused(library, name, shape):
    paired = "FoldedAttentionOfPairs"
    assert operator(library, OPERANDS | PAIRED, paired).shape == (2, 1, 4, 3)
    with pytest.raises(Exception, match=r"the sizes of (rows|scales or second halves) do not fit the others"):
        operator(library, OPERANDS | PAIRED | {name: shape}, paired)


def test_no_queries_are_no_outputs(library):
    none = {"plain": (2, 0, 4, 3), "turned": (2, 0, 2, 2, 4), "seen": (2, 0, 5)}
    assert operator(library, OPERANDS | none).shape == (2, 0, 4, 3)


@pytest.mark.parametrize(
    ("op_type", "variant"),
    [
        (CACHED, Variant()),
        (LATENT, Variant(bidirectional=True)),
    ],
)
def test_what_it_does_not_compute_is_refused(op_type, variant):
    with pytest.raises(ValueError, match="fused operator is for"):
        attention_function(op_type, 24, variant, fused=True)


# ---- whole models

files = test_onnx_session.files
PROMPTS = test_onnx_session.PROMPTS


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", test_onnx_session.NAMES)
def test_models_say_the_same_tokens(files, name, kind):
    check_model(files(name), kind)


def check_model(own, kind):
    """Every layer is fused, and logits are those of the standard operators up to roundings: 1e-6 of them was seen."""
    fused, standard = own.open(kind, kernel="auto"), own.open(kind)
    assert fused.fused
    assert not standard.fused
    functions = {function.name: function for function in fused_model(own.paths[kind]).functions}
    nodes = [node for node in onnx.load(own.paths[kind]).graph.node if node.domain == DOMAIN]
    assert len(nodes) == len(own.windows)
    assert all("FoldedAttention" in str(functions[node.op_type]) for node in nodes)
    ids = np.random.default_rng(0).integers(0, fused.vocabulary, (2, 12))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    sizes = (5, 1, 1, 3, 1, 1)
    expected, _ = test_onnx_session.in_pieces(standard, ids, mask, sizes)
    got, _ = test_onnx_session.in_pieces(fused, ids, mask, sizes)
    np.testing.assert_allclose(got[mask > 0], expected[mask > 0], rtol=0, atol=1e-5 * np.abs(expected).max())
    assert fused.generate(PROMPTS, 20) == standard.generate(PROMPTS, 20)


class StaticFiles(test_onnx_session.Files):
    """Without the file whose cache grows."""

    def write(self, path, static):
        if static:
            super().write(path, static)


FEATURES = {
    "qwen3": {"key_scales", "window"},
    "gemma2": {"softcap", "window"},
    "gpt-oss": {"sinks", "window"},
    "bloom": {"slopes"},
    "gemma4": {"key_scales", "value_scales", "window"},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "gemma4" else []) for n in FEATURES])
def test_models_of_families_say_the_same_tokens(name, tmp_path):
    module = CONVERTIBLE[name].build()
    own = StaticFiles(Captured(module, capture(module, None)), tmp_path)
    named = " ".join(function.name for function in onnx.load(own.paths["static"]).functions)
    assert all(feature in named for feature in FEATURES[name])
    check_model(own, "static")


def test_weights_beside_a_file_are_found(files, tmp_path):
    model = onnx.load(files().paths["static"])
    path = tmp_path / "outside.onnx"
    onnx.save(model, path, save_as_external_data=True, location="outside.onnx.data")
    assert OnnxDecoder(path, kernel="fused").generate(PROMPTS, 3) == files().open("static").generate(PROMPTS, 3)
    with pytest.raises(UsageError, match="lie beside it"):
        write_fused(path, tmp_path / "elsewhere" / "fused.onnx")
    write_fused(path, tmp_path / "fused.onnx")
    check_alone(tmp_path / "fused.onnx")


def check_alone(path):
    """The file and its library run in ONNX Runtime, in a process that has nothing of ours."""
    program = f"""
import onnxruntime, sys
options = onnxruntime.SessionOptions()
options.register_custom_ops_library({str(path.with_suffix(".so"))!r})
session = onnxruntime.InferenceSession({str(path)!r}, options, ["CPUExecutionProvider"])
assert not any(name.startswith("mla_compile") for name in sys.modules)
print(session.get_outputs()[0].name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "logits\n"


def test_a_file_and_its_library_are_written(files, tmp_path):
    out = tmp_path / "fused.onnx"
    assert write_fused(files().paths["dynamic"], out) == tmp_path / "fused.so"
    check_alone(out)
    with pytest.raises(UsageError, match="exists"):
        write_fused(files().paths["dynamic"], out)
    write_fused(files().paths["dynamic"], out, force=True)


def test_the_file_that_is_read_is_not_replaced(files, tmp_path):
    """Its weights may lie in a file of their own, which would go with it."""
    path = tmp_path / "model.onnx"
    model = onnx.load(files().paths["dynamic"])
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="is the file that is to be read"):
        write_fused(path, path, force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write_fused(path, tmp_path / "fused.onnx")
    with pytest.raises(RefusedError, match=r"written by mla-compile fuse already\. Give the file"):
        write_fused(tmp_path / "fused.onnx", tmp_path / "again.onnx")
    assert (tmp_path / "model.onnx.data").exists()


def test_the_command_line_says_what_it_wrote(files, tmp_path, capsys):
    words = ["fuse", str(files().paths["static"]), "--out", str(tmp_path / "fused.onnx")]
    assert main(words) == 0
    assert capsys.readouterr().out.split() == ["wrote", words[-1], "and", str(tmp_path / "fused.so")]
    assert main(words) == 2
    capsys.readouterr()
    assert main([*words, "--force", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"onnx": words[-1], "library": str(tmp_path / "fused.so")}
    assert said.err == ""
    with pytest.raises(UsageError, match=r"written by mla-compile fuse.*--kernel auto or fused"):
        OnnxDecoder(tmp_path / "fused.onnx", kernel="standard")
    assert OnnxDecoder(tmp_path / "fused.onnx", kernel="auto").fused


def test_what_cannot_be_written_is_said(files, tmp_path):
    path = files().paths["static"]
    with pytest.raises(UsageError, match="with the suffix"):
        write_fused(path, tmp_path / "fused.bin")
    with pytest.raises(LoadError, match="no file"):
        write_fused(tmp_path / "nothing.onnx", tmp_path / "fused.onnx")
    (tmp_path / "damaged.onnx").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LoadError, match="damaged"):
        write_fused(tmp_path / "damaged.onnx", tmp_path / "fused.onnx")
    inlined = onnx.inliner.inline_local_functions(onnx.load(path))
    onnx.save(inlined, tmp_path / "inlined.onnx")
    with pytest.raises(RefusedError, match="written without --inline"):
        write_fused(tmp_path / "inlined.onnx", tmp_path / "fused.onnx")
    with pytest.raises(UsageError, match="--kernel standard"):
        OnnxDecoder(tmp_path / "inlined.onnx", kernel="fused")
    assert not OnnxDecoder(tmp_path / "inlined.onnx", kernel="auto").fused
    with pytest.raises(UsageError, match=r"knows no processor 'abacus' .*as --march"):
        write_fused(path, tmp_path / "fused.onnx", march="abacus")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged.onnx", "inlined.onnx"]


def test_bfloat16_runs_as_it_is(files, tmp_path):
    model = onnx.load(files().paths["static"])
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    assert fused_model(tmp_path / "half.onnx") is None


def test_without_a_compiler_the_standard_operators_run(files, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    monkeypatch.setenv("MLA_COMPILE_CACHE", str(tmp_path))
    assert not files().open("static", kernel="auto").fused
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler"):
        files().open("static", kernel="fused")


def test_an_unknown_kernel_is_refused(files):
    with pytest.raises(UsageError, match="no kernel 'fast'"):
        files().open("static", kernel="fast")


def test_a_compiler_that_fails_is_not_in_the_way(files, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("MLA_COMPILE_CACHE", str(tmp_path))
    assert not files().open("static", kernel="auto").fused
    assert "could not compile the fused kernel" in caplog.text
    with pytest.raises(UsageError, match="could not compile"):
        files().open("static", kernel="fused")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("no-such-compiler -O1", r"There is no compiler 'no-such-compiler', which the environment variable CXX names"),
        ("'c++", r"There is no compiler ''c\+\+', which"),
    ],
)
def test_a_compiler_that_is_named_and_missing_is_said(files, monkeypatch, tmp_path, caplog, named, sentence):
    monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("MLA_COMPILE_CACHE", str(tmp_path))
    assert not files().open("static", kernel="auto").fused
    assert re.search(sentence, caplog.text)
    with pytest.raises(UsageError, match=sentence):
        files().open("static", kernel="fused")


def test_a_compiler_that_cannot_be_run_is_named(monkeypatch, tmp_path):
    named = tmp_path / "compiler"
    named.write_bytes(b"no program")
    named.chmod(0o755)
    monkeypatch.setenv("CXX", str(named))
    with pytest.raises(UsageError, match=r"compiler' cannot be run \(Exec format error\)\. .*CXX"):
        compiling.compile_library(tmp_path / "made.so")
    assert [f.name for f in tmp_path.iterdir()] == ["compiler"]


def test_a_compiler_may_be_named_with_words_before_and_behind_it(monkeypatch, tmp_path):
    found = compiling.compiler()
    monkeypatch.setenv("CXX", f"env {found[0]} '-DWORD=of two'")
    assert compiling.compiler()[1:] == [found[0], "-DWORD=of two"]
    source = tmp_path / "operators.cpp"
    monkeypatch.setattr(compiling, "SOURCE", source)
    source.write_text("#ifndef WORD\n#error it did not come\n#endif\n")
    compiling.compile_library(tmp_path / "made.so")
    assert (tmp_path / "made.so").read_bytes()


def test_a_library_that_cannot_be_loaded_is_not_in_the_way(files, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(compiling, "library", lambda: broken)
    assert not files().open("static", kernel="auto").fused
    assert f"'{broken}', the library of the fused kernel, cannot be loaded (" in caplog.text
    with pytest.raises(UsageError, match=r"broken\.so', the library .* run files without it: --kernel standard"):
        files().open("static", kernel="fused")


def test_the_library_is_compiled_once(library, monkeypatch):
    monkeypatch.setattr(compiling, "compile_library", pytest.fail)
    assert compiling.library() == library


def test_generated_tokens_are_the_same_for_any_threads(files):
    one, two = (OnnxDecoder(files().paths["static"], threads=n, kernel="fused").generate(PROMPTS, 10) for n in (1, 2))
    assert one == two
