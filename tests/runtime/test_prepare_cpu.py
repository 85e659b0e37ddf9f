"""What comes before attention in the fused kernel for processors: one operator, against standard operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from latent_cases import Case, cases
from onnx import helper
from test_fused_cpu import SHORT, STEPS, library, older  # noqa: F401
from test_onnx_function import every_node, variant_of
from test_onnx_static import SPARE, slots_of

from mla_compile.runtime.cpu import library as compiling
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_variant import DOMAIN, FUSED_DOMAIN, LATENT, VERSION, Variant

pytestmark = pytest.mark.skipif(compiling.compiler() is None, reason="there is no C++ compiler")


@dataclass(frozen=True)
class Form:
    """What a cache is."""

    static: bool = False
    quantised: bool = False
    halves: bool = False
    float16: bool = False

    def variant(self, case) -> Variant:
        return replace(variant_of(case), static=self.static, quantised=self.quantised, halves=self.halves)

    def function(self, case, fused: bool) -> onnx.FunctionProto:
        float16 = fused and self.float16
        return attention_function(LATENT, 24, self.variant(case), fused=fused, float16=float16)

    def rows(self, case) -> int:
        """Of the cache before the step."""
        if self.static and case.window and not self.halves:
            return case.window - 1
        if self.static:
            return case.past + case.new + SPARE
        return case.past if self.halves or not case.window else min(case.past, case.window - 1)


FORMS = {
    "growing": Form(),
    "static": Form(static=True),
    "codes, growing": Form(quantised=True),
    "codes, static": Form(quantised=True, static=True),
    "halves of rows, growing": Form(halves=True),
    "halves of rows, static": Form(halves=True, static=True),
    "float16, growing": Form(float16=True),
    "float16, static": Form(float16=True, static=True),
}
EXACT = [name for name, form in FORMS.items() if not form.float16]


def before_attention(case) -> Case:
    return replace(case, up_groups=1, softcap=0, sinks=False, scaled_rope=False)


ALL_KINDS = SHORT | {
    "no window, odd channels": Case(half=11, nope=5, rank=37),
    "longer chunks, slopes": Case(past=11, window=5, chunked=True, slopes=True),
    "long window": Case(past=13, window=9, padding=((0, 0), (3, 0))),
}
# Those alone that differ in what is computed before attention.
KINDS = {name: ALL_KINDS[name] for name in {before_attention(case): name for name, case in ALL_KINDS.items()}.values()}
FEW = ["no window, odd channels", "longer chunks, slopes", "long window", "everything", "key and value scales"]


def inputs_of(case, form: Form) -> dict[str, np.ndarray]:
    """By the function's names. Unused rows of a cache are numbers, or codes."""
    x = {name: value.numpy() for name, value in case.tensors(torch.float32).items()}
    random = np.random.default_rng(case.seed)
    batch, rows, scales = case.batch, form.rows(case), case.key_scales + case.value_scales
    past = {"past_BPR": random.standard_normal((batch, rows, case.width)).astype(np.float32)}
    if form.quantised:
        past["past_BPR"] = random.integers(1, 256, (batch, rows, case.width - scales)).astype(np.uint8)
        past["past_BP2"] = random.uniform(0.01, 0.1, (batch, rows, 2 + scales)).astype(np.float32)
    if form.halves:
        width = (case.width + 1) // 2 + 3
        past = {f"past_{n}_B1PW": random.standard_normal((batch, 1, rows, width)).astype(np.float32) for n in PAIR}
    names = {"attention_mask": "attention_mask_BT", "query": "query_BSHD", "row": "row_BNR", "cos": "cos_BSn"}
    names |= {"sin": "sin_BSn", "key_up": "key_up_GDr", "value_up": "value_up_GrV"}
    names |= {"sinks": "sinks_H", "slopes": "slopes_H"}
    given = {names[name]: value for name, value in x.items() if name != "past"} | past
    if form.float16:
        whole = {"attention_mask_BT", "cos_BSn", "sin_BSn"}
        given = {name: v if name in whole else v.astype(np.float16) for name, v in given.items()}
    return given


PAIR = ("key", "value")
TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int64): 7, np.dtype(bool): 9}
TYPES |= {np.dtype(np.float16): 10}


def attributes_of(case, function: onnx.FunctionProto) -> dict[str, int | float]:
    numbers = {"num_heads": case.heads, "rope_groups": case.rope_groups, "rope_dim": 2 * case.half}
    numbers |= {"latent_rank": case.rank, "scale": case.scale, "softcap": case.softcap, "window": case.window}
    numbers |= {"key_scales": case.key_scales, "value_scales": case.value_scales}
    return {name: numbers.get(name, 1) for name in function.attribute}


def opened(libraries, node, given: Mapping[str, np.ndarray], results: Mapping[str, int], functions=(), threads=1):
    """A session of one node whose sizes are told at run time."""

    def described(name, kind, shape=None):
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [node],
        "node",
        [described(name, TYPES[value.dtype], [None] * value.ndim) for name, value in given.items()],
        [described(name, kind) for name, kind in results.items()],
    )
    imports = [helper.make_opsetid(*domain) for domain in (("", 24), (DOMAIN, VERSION), (FUSED_DOMAIN, 1))]
    model = helper.make_model(graph, functions=list(functions), opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(libraries))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def session_of(libraries, case, form: Form, fused: bool, inner=(), threads=1):
    """A node's body, of which names of its inside are results too."""
    function = onnx.FunctionProto()
    function.CopyFrom(form.function(case, fused))
    function.output.extend(inner)
    given = inputs_of(case, form)
    number = TYPES[given["query_BSHD"].dtype]
    results = dict.fromkeys(function.output, number)
    results |= {name: TYPES[given["past_BPR"].dtype] for name in results if name.endswith("_BTR") and not form.halves}
    results |= {name: 1 for name in results if name.endswith("_BT2")}
    results |= {"seen_BST": 9, "many": 9} if inner else {}
    if fused:
        results |= {name: 1 for name in inner if name in ("plain_BSHD", "turned_BSnhd", "distance_BST")}
    elif "distance_BST" in results:
        results["distance_BST"] = 7
    results = {name: kind for name, kind in results.items() if name in function.output}
    node = helper.make_node(
        function.name, [*function.input], [*function.output], domain=DOMAIN, **attributes_of(case, function)
    )
    return opened(libraries, node, given, results, [function], threads)


def inside_of(case, form: Form) -> list[str]:
    """What the operator makes, and standard operators do."""
    names = ["plain_BSHD", "turned_BSnhd", "seen_BST"]
    names += ["distance_BST"] if case.slopes else []
    if case.window and not form.halves:
        names += ["rows_BTR", "rows_BT2"] if form.quantised else ["rows_BTR"]
    written = {name for node in form.function(case, False).node for name in node.output}
    return names + (["many"] if "many" in written else [])


def run(session, given) -> dict[str, np.ndarray]:
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, given), strict=True))


def check(libraries, case, form: Form, threads=1) -> None:
    """Number for number; of distances, those that count."""
    given, inner = inputs_of(case, form), inside_of(case, form)
    expected = run(session_of(libraries, case, form, False, inner), given)
    got = run(session_of(libraries, case, form, True, inner, threads), given)
    assert [*got] == [*expected]
    for name, value in expected.items():
        if name == "distance_BST":
            np.testing.assert_array_equal(got[name][got["seen_BST"]], value[expected["seen_BST"]])
        elif name != "output_BSHV":  # this alone test_fused_cpu compares with a tolerance of its own
            np.testing.assert_array_equal(got[name], value, err_msg=name)


def exists(case, form: Form) -> bool:
    return not (form.static and case.window == 1)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_standard_operators(library, kind, form, step):  # noqa: F811
    case = replace(KINDS[kind], new=STEPS[step][0], past=STEPS[step][1])
    if exists(case, FORMS[form]):
        check(library, case, FORMS[form])


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("kind", FEW)
def test_equals_standard_operators_on_older_processors(older, kind, form):  # noqa: F811
    check(older, KINDS[kind], FORMS[form])


@given(cases(), st.sampled_from(EXACT))
@settings(max_examples=60)
def test_equals_standard_operators_for_any_sizes(case, form):
    assume(exists(case, FORMS[form]))
    check(compiling.library(), case, FORMS[form])


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("window", [0, 700])
def test_equals_standard_operators_in_several_threads(library, window, form):  # noqa: F811
    """So long that each part is divided: queries, rows, the copy of earlier ones, and masks."""
    case = Case(batch=3, past=1500, new=1100, window=window, slopes=True, half=4, padding=((0, 0), (99, 0), (0, 7)))
    check(library, case, FORMS[form], threads=2)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.float16])
@pytest.mark.parametrize("kind", FEW)
def test_float16_is_what_standard_operators_keep(library, kind, form, step):  # noqa: F811
    """Rotations are computed in float32 there too; masks are the same, and queries are not rounded on their way."""
    case, form = replace(KINDS[kind], new=STEPS[step][0], past=STEPS[step][1]), FORMS[form]
    if not exists(case, form):
        return
    given, inner = inputs_of(case, form), inside_of(case, form)
    expected, got = (run(session_of(library, case, form, fused, inner), given) for fused in (False, True))
    for name in {*expected} & {"present_BTR", "rows_BTR", "seen_BST", "many"}:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    for name in ("plain_BSHD", "turned_BSnhd"):
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=2e-3 * np.abs(expected[name]).max(initial=0))


PRESENT = {"past_BPR": "present_BTR", "past_BP2": "present_BT2"}
PRESENT |= {f"past_{name}_B1PW": f"present_{name}_B1TW" for name in PAIR}


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.static])
@pytest.mark.parametrize("kind", FEW)
def test_one_memory_for_both_caches_is_written_in_place(library, kind, form):  # noqa: F811
    case, form = KINDS[kind], FORMS[form]
    session, given = session_of(library, case, form, True), inputs_of(case, form)
    apart = run(session, given)
    binding, memory = session.io_binding(), {}
    for name, value in given.items():
        if name in PRESENT:
            memory[name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
            binding.bind_ortvalue_input(name, memory[name])
            binding.bind_ortvalue_output(PRESENT[name], memory[name])
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
    binding.bind_output("output_BSHV")
    session.run_with_iobinding(binding)
    for name, value in memory.items():
        np.testing.assert_array_equal(value.numpy(), apart[PRESENT[name]])
    output = next(o for o in binding.get_outputs() if o.data_ptr() not in {m.data_ptr() for m in memory.values()})
    np.testing.assert_array_equal(output.numpy(), apart["output_BSHV"])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("form", ["static", "codes, static", "float16, static"])
def test_a_ring_is_filled_over_and_over(library, form, chunked):  # noqa: F811
    """Steps of one token, of several, and of more than the ring holds: as standard operators write it, and as a cache
    that grows has it."""
    form, steps = FORMS[form], (2, 1, 3, 1, 1, 9, 1, 2, 1, 5)
    case = Case(window=5, chunked=chunked, past=0, padding=((0, 0), (3, 0)))
    total, known = sum(steps), 0
    x = inputs_of(replace(case, new=total), form)
    grows = replace(form, static=False)
    opens = {fused: session_of(library, case, form, fused) for fused in (False, True)}
    opens["grows"] = session_of(library, case, grows, True)
    empty = {name: value for name, value in inputs_of(case, grows).items() if name in PRESENT}
    caches = {fused: {name: x[name] for name in PRESENT if name in x} for fused in (False, True)} | {"grows": empty}
    for new in steps:
        token = slice(known, known + new)
        per_token = {n: x[n][:, token] for n in ("query_BSHD", "row_BNR", "cos_BSn", "sin_BSn")}
        known += new
        step = {n: v for n, v in x.items() if n not in PRESENT} | per_token
        step |= {"attention_mask_BT": x["attention_mask_BT"][:, :known]}
        made = {way: run(session, step | caches[way]) for way, session in opens.items()}
        caches = {way: {n: made[way][PRESENT[n]] for n in caches[way]} for way in caches}
        for name, value in caches[True].items():
            np.testing.assert_array_equal(value, caches[False][name])
            slots = slots_of(case, known, case.window - 1)
            np.testing.assert_array_equal(value[:, slots], caches["grows"][name])
        np.testing.assert_array_equal(made[True]["output_BSHV"].shape, made["grows"]["output_BSHV"].shape)
        np.testing.assert_allclose(
            made[True]["output_BSHV"], made["grows"]["output_BSHV"], rtol=0, atol=2e-3 if form.float16 else 1e-5
        )


@pytest.mark.parametrize(("form", "count"), [("growing", 5), ("codes, static", 5), ("float16, growing", 9)])
def test_a_body_has_few_nodes(form, count):
    """A cast of the mask, the operator, the choice, and attention and a cast to its type; with float16, six more casts
    of inputs. In the unfolded form all leads to its result, and nothing is of queries, masks and caches."""
    function = FORMS[form].function(Case(), True)
    (choice,) = (node for node in function.node if node.op_type == "If")
    unfolded, folded = (attribute.g.node for attribute in choice.attribute)
    assert len(function.node) + len(folded) == count
    nodes = list(every_node(function.node))
    used = {name for node in nodes for name in node.input} | {*function.output}
    assert {node.output[0] for node in unfolded} <= used | {"unfolded_BSHV"}
    assert not {"CumSum", "TensorScatter", "Range", "Less", "Round", "Cos"} & {node.op_type for node in unfolded}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sinks", "slopes", "everything", "scaled rope, groups"])
def test_all_that_a_body_uses_is_made(kind, form):
    function = FORMS[form].function(ALL_KINDS[kind], True)
    nodes = list(every_node(function.node))
    made = {*function.input} | {name for node in nodes for name in node.output}
    assert {name for node in nodes for name in node.input if name} <= made


# ---- the operator by itself

SIZES = {
    "query": (2, 3, 4, 7),
    "row": (2, 3, 15),
    "past": (2, 6, 15),
    "mask": (2, 9),
    "cos": (2, 3, 2, 2),
    "sin": (2, 3, 2, 2),
    "key_up": (2, 3, 5),
    "value_up": (2, 5, 3),
}
SIZES_OF_CODES = SIZES | {"past": (2, 6, 13), "scales": (2, 6, 4)}
SIZES_OF_PAIRS = SIZES | {"past": (2, 1, 6, 9), "second": (2, 1, 6, 9)}
ATTRIBUTES = {"scale": 1.0, "rope_groups": 2, "rope_dim": 4, "latent_rank": 5, "value_scales": 2}
KINDS_OF_INPUTS = {"mask": np.int64}


def operator(libraries, shapes, name="PrepareAttention", past=np.float32, given=None, **attributes):
    """An operator's results, of ones."""
    kinds = KINDS_OF_INPUTS | {"past": past}
    x = {n: np.ones(s, kinds.get(n, np.float32)) for n, s in shapes.items()} | (given or {})
    results = {"plain": 1, "turned": 1, "many": 9, "seen": 9, "present": TYPES[np.dtype(past)]}
    results |= {"beside" if len(shapes) > len(SIZES) else "": 1}
    apart = attributes.get("window") and "second" not in shapes
    results |= {"distance": 1, "rows": TYPES[np.dtype(past)]} if apart else {}
    results |= {"rows_beside": 1} if apart and "scales" in shapes else {}
    slopes = {"has_slopes": 1} if apart else {}
    node = helper.make_node(name, [*x], [*results], domain=FUSED_DOMAIN, **ATTRIBUTES | slopes | attributes)
    return run(opened(libraries, node, x, {n: kind for n, kind in results.items() if n}), x)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("query", (2, 3, 4, 8), "queries"),
        ("query", (2, 3, 28), "queries"),
        ("row", (2, 3, 14), "rows"),
        ("row", (2, 2, 15), "rows"),
        ("row", (1, 3, 15), "rows"),
        ("past", (2, 6, 14), "cache"),
        ("past", (1, 6, 15), "cache"),
        ("past", (2, 6, 1, 15), "cache"),
        ("past", (2, 7, 15), "mask"),
        ("mask", (2, 8), "mask"),
        ("mask", (2, 10), "mask"),
        ("mask", (3, 9), "mask"),
        ("mask", (9,), "mask"),
        ("cos", (2, 2, 2, 2), "cosines"),
        ("cos", (2, 3, 2, 1), "cosines"),
        ("sin", (2, 1, 2, 2), "sines"),
        ("key_up", (2, 3, 4), "key up-projections"),
        ("key_up", (2, 4, 5), "queries"),
        ("value_up", (2, 4, 3), "value up-projections"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(library, name, shape, words):  # noqa: F811
    assert operator(library, SIZES)["present"].shape == (2, 9, 15)
    with pytest.raises(Exception, match=f"the sizes of {words} do not fit the others"):
        operator(library, SIZES | {name: shape})


@pytest.mark.parametrize(
    ("sizes", "name", "shape"),
    [
        (SIZES_OF_CODES, "scales", (2, 6, 3)),
        (SIZES_OF_CODES, "scales", (2, 5, 4)),
        (SIZES_OF_CODES, "past", (2, 6, 15)),
        (SIZES_OF_PAIRS, "past", (2, 1, 6, 7)),
        (SIZES_OF_PAIRS, "past", (2, 2, 6, 9)),
        (SIZES_OF_PAIRS, "second", (2, 1, 6, 8)),
        (SIZES_OF_PAIRS, "second", (2, 1, 5, 9)),
    ],
)
def test_sizes_of_other_caches_that_do_not_fit_are_refused(library, sizes, name, shape):  # noqa: F811
    codes = sizes is SIZES_OF_CODES
    called = ("PrepareAttentionOfCodes", np.uint8) if codes else ("PrepareAttentionOfPairs", np.float32)
    assert operator(library, sizes, *called)["beside"].shape == (2, 9, 4) if codes else (2, 1, 9, 9)
    with pytest.raises(Exception, match=r"the sizes of (scales or second halves|cache) do not fit the others"):
        operator(library, sizes | {name: shape}, *called)


@pytest.mark.parametrize(
    ("attributes", "total", "words"),
    [
        ({"static": 1}, 7, "room for 6 tokens, and there are 7"),
        ({"static": 1}, 2, "mask"),
        ({"static": 1, "window": 7}, 2, "mask"),
        ({"window": 7}, 8, "mask"),
        ({"rope_groups": 3}, 9, "rope_groups do not divide"),
        ({"rope_groups": 0}, 9, "rope_groups do not divide"),
        ({"rope_dim": 3}, 9, "rope_groups do not divide the heads, or an attribute is no size"),
        ({"window": -1}, 9, "an attribute is no size"),
    ],
)
def test_tokens_for_which_there_is_no_room_are_refused(library, attributes, total, words):  # noqa: F811
    assert operator(library, SIZES | {"mask": (2, 6)}, static=1)["present"].shape == (2, 6, 15)
    with pytest.raises(Exception, match=words):
        operator(library, SIZES | {"mask": (2, total)}, **attributes)


def test_a_mask_of_more_tokens_than_a_window_keeps_is_taken(library):  # noqa: F811
    for attributes in ({"window": 7}, {"window": 7, "static": 1}):
        made = operator(library, SIZES | {"mask": (2, 40)}, **attributes)
        assert made["present"].shape == (2, 6, 15)
        assert made["rows"].shape == (2, 9, 15)
        np.testing.assert_array_equal(made["seen"].sum(-1), np.full((2, 3), 7))


def test_a_ring_without_room_keeps_nothing(library):  # noqa: F811
    made = operator(library, SIZES | {"past": (2, 0, 15)}, static=1, window=1)
    assert made["present"].shape == (2, 0, 15)
    np.testing.assert_array_equal(made["seen"], np.broadcast_to(np.eye(3, dtype=bool), (2, 3, 3)))


def test_a_window_may_be_as_large_as_its_type(library):  # noqa: F811
    made = operator(library, SIZES, window=2**63 - 1, chunked=1)
    np.testing.assert_array_equal(made["seen"].sum(-1), [[7, 8, 9]] * 2)
    assert made["present"].shape == (2, 9, 15)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 1, 2, 2), (2, 3, 1, 2), (1, 1, 1, 2)])
def test_a_rotation_may_be_that_of_all(library, shape):  # noqa: F811
    """Of sequences, tokens or groups, as standard operators take it."""
    random = np.random.default_rng(0)
    given = {n: random.standard_normal(shape).astype(np.float32) for n in ("cos", "sin")}
    given |= {n: random.standard_normal(SIZES[n]).astype(np.float32) for n in ("query", "row")}
    every = {n: np.broadcast_to(v, SIZES[n]).copy() if n in ("cos", "sin") else v for n, v in given.items()}
    got, expected = (operator(library, SIZES, given=x) for x in (given, every))
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def check_rounding(libraries, rank: int) -> None:
    """Every float16, what lies in the middle of two, and what is next to that; and what is too large."""
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (every[:-1] + every[1:]) / 2
    sizes = np.concatenate(
        [every, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(9e9))]
    )
    sizes = np.concatenate([sizes, np.float32([65519.9, 65520, 65536, 1e6, 3e38, np.inf, 1e-45, 1e-30])])
    numbers = np.concatenate([sizes, -sizes])
    numbers = np.resize(numbers, (1, -(-len(numbers) // rank), rank))
    tokens = numbers.shape[1]
    shapes = {"query": (1, tokens, 1, 2), "row": numbers.shape, "past": (1, 0, rank), "mask": (1, tokens)}
    shapes |= {"cos": (1, tokens, 1, 0), "sin": (1, tokens, 1, 0), "key_up": (1, 2, rank), "value_up": (1, rank, 2)}
    # A window keeps masks small: all queries by all tokens are of gigabytes.
    parts, step = [], 500
    for start in range(0, tokens, step):
        part = numbers[:, start : start + step]
        own = {
            n: (s[0], part.shape[1], *s[2:]) if n in ("query", "row", "cos", "sin") else s for n, s in shapes.items()
        }
        own["mask"] = (1, part.shape[1])
        made = operator(
            libraries,
            own,
            "PrepareAttentionOfHalves",
            np.float16,
            {"row": part},
            rope_groups=1,
            rope_dim=0,
            latent_rank=rank,
            value_scales=0,
        )
        parts.append(made["present"])
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16)
    np.testing.assert_array_equal(np.concatenate(parts, 1).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("rank", [7, 640])
def test_every_number_becomes_the_nearest_float16(library, rank):  # noqa: F811
    check_rounding(library, rank)


def test_every_number_becomes_the_nearest_float16_on_older_processors(older):  # noqa: F811
    check_rounding(older, 641)


@pytest.mark.parametrize("levels", [(63, 64, 0, 5), (127, 128, 5, 13)], ids=["latents", "rope keys"])
def test_ties_of_codes_go_to_the_even_one(library, levels):  # noqa: F811
    """The largest number is worth the levels, so that a unit is one; and zeros have the smallest scale."""
    most, middle, begin, end = levels
    row = np.zeros(SIZES["row"], np.float32)
    row[:, :2, begin:end] = np.resize([most, -most, 0.5, 1.5, -0.5], end - begin)
    given = {"row": row, "cos": np.ones(SIZES["cos"], np.float32), "sin": np.zeros(SIZES["sin"], np.float32)}
    made = operator(library, SIZES_OF_CODES, "PrepareAttentionOfCodes", np.uint8, given)
    new = made["present"][:, 6:, begin:end]
    np.testing.assert_array_equal(new[:, 0], [np.resize(np.array([most, -most, 0, 2, 0]) + middle, end - begin)] * 2)
    np.testing.assert_array_equal(new[:, 2], np.full((2, end - begin), middle))
    scale = made["beside"][:, 6:, 0 if begin == 0 else 1]
    np.testing.assert_array_equal(scale, np.float32([[1, 1, np.float32(1e-20) / np.float32(most)]] * 2))
