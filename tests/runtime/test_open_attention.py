"""``mla::latent_attention`` when it is not causal: an encoder's attention, and a decoder's to an encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from mla_compile.runtime import ops, reference
from mla_compile.runtime.attention import attend_folded, attend_unfolded, rotate_and_append
from mla_compile.runtime.masks import open_keys
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_variant import DOMAIN, LATENT, VERSION, Variant

# Float64 on both sides, in another order of additions.
EXACT = {"rtol": 1e-10, "atol": 1e-11}
# float32 rounds by 6e-8 of numbers up to about 30; two products and a softmax in between make some 1e-6 of that.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Problem:
    """Sizes of one problem; ``real`` is how many keys of each sequence are no padding."""

    queries: int = 5
    rows: int = 5
    past: int = 0
    heads: int = 4
    rope_groups: int = 2
    half: int = 2
    nope: int = 3
    rank: int = 6
    v_dim: int = 3
    key_scales: int = 0
    softcap: float = 0.0
    sinks: bool = False
    real: tuple[int, ...] = (5, 3)
    seed: int = 0

    @property
    def cross(self) -> bool:
        return self.queries != self.rows or not self.half

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        batch, width = len(self.real), self.rank + 2 * self.half * self.rope_groups + self.key_scales
        angle = 5 * torch.rand(batch, 1 if self.cross else self.rows, self.rope_groups, self.half, generator=generator)
        shapes = {
            "query": (batch, self.queries, self.heads, self.nope + 2 * self.half),
            "row": (batch, self.rows, width),
            "past": (batch, self.past, width),
            "key_up": (2, self.nope, self.rank),
            "value_up": (2, self.rank, self.v_dim),
        }
        made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        made |= {"cos": angle.double().cos(), "sin": angle.double().sin()}
        if self.sinks:
            made["sinks"] = torch.randn(self.heads, generator=generator, dtype=torch.float64)
        made = {name: x.to(dtype) for name, x in made.items()}
        places = torch.arange(self.past + self.rows)
        return made | {"attention_mask": (places < torch.tensor(self.real)[:, None]) * (1 + places % 3)}

    def run(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        first = [x[n] for n in ("query", "row", "past", "attention_mask", "cos", "sin", "key_up", "value_up")]
        return ops.latent_attention(*first, x.get("sinks"), None, 0.4, 0, self.softcap, 0, False)

    def expected(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return reference.latent_attention(**x, scale=0.4, window=None, softcap=self.softcap, causal=False)


CROSS = Problem(queries=3, rows=7, half=0, rope_groups=1, real=(7, 2))
PROBLEMS = {
    "encoder": Problem(),
    "encoder without rope": Problem(half=0, rope_groups=1),
    "cross": CROSS,
    "one query": replace(CROSS, queries=1),
    "rows given before": replace(CROSS, rows=0, past=7),
    "more queries than keys": replace(CROSS, queries=9, rows=2, real=(2, 1)),
    "key scales, soft-cap, sinks": Problem(key_scales=2, softcap=1.5, sinks=True),
    "cross, key scales": replace(CROSS, key_scales=4),
    "sinks": Problem(sinks=True),
    "nothing real": Problem(real=(0, 5)),
}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    cross = draw(st.booleans())
    queries = draw(st.integers(1, 6))
    rows, past = (draw(st.integers(0, 6)), draw(st.integers(0, 3))) if cross else (queries, 0)
    rows += rows + past == 0
    real = tuple(draw(st.lists(st.integers(0, rows + past), min_size=1, max_size=3)))
    return Problem(
        queries=queries,
        rows=rows,
        past=past,
        half=0 if cross else draw(st.integers(0, 2)),
        key_scales=draw(st.sampled_from([0, 1, 4])),
        softcap=draw(st.sampled_from([0.0, 1.5])),
        sinks=draw(st.booleans()),
        real=real,
        seed=draw(st.integers(0, 2**16)),
    )


@given(problems())
def test_equals_the_reference(problem):
    x = problem.tensors()
    for got, expected in zip(problem.run(x), problem.expected(x), strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_both_forms_equal_the_reference(problem):
    x = problem.tensors()
    expected, _ = problem.expected(x)
    query, present = rotate_and_append(x["query"], x["row"], x["past"], x["cos"], x["sin"], problem.rank)
    mask = open_keys(x["attention_mask"], problem.queries).unsqueeze(1)
    for form in (attend_folded, attend_unfolded):
        up = x["key_up"], x["value_up"], problem.rope_groups, x.get("sinks")
        torch.testing.assert_close(form(query, present, mask, *up, 0.4, problem.softcap), expected, **EXACT)


def test_the_reference_is_ordinary_attention():
    """An oracle of its own: torch's attention over keys and values made from the rows."""
    x = CROSS.tensors()
    key = torch.einsum("btr,gdr->bgtd", x["row"], x["key_up"]).repeat_interleave(2, 1)
    value = torch.einsum("btr,grd->bgtd", x["row"], x["value_up"]).repeat_interleave(2, 1)
    seen = (x["attention_mask"] != 0)[:, None, None].expand(-1, 1, CROSS.queries, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(x["query"].transpose(1, 2), key, value, seen, scale=0.4)
    torch.testing.assert_close(CROSS.expected(x)[0].transpose(1, 2), expected, **EXACT)


@given(problems(), st.integers(0, 2**16))
def test_padding_is_not_read(problem, seed):
    x = problem.tensors()
    real = x["attention_mask"] != 0
    noise = torch.randn(*real.shape, 1, generator=torch.Generator().manual_seed(seed)).double() * ~real[..., None]
    changed = {"past": x["past"] + noise[:, : problem.past], "row": x["row"] + noise[:, problem.past :]}
    some = real.any(1)
    torch.testing.assert_close(problem.run(x | changed)[0][some], problem.run(x)[0][some], **EXACT)


@pytest.mark.parametrize("problem", [PROBLEMS["encoder"], CROSS, PROBLEMS["rows given before"]], ids=str)
def test_gradients_equal_those_of_the_reference(problem):
    names = [n for n, value in problem.tensors().items() if value.is_floating_point()]

    def gradients(run):
        x = problem.tensors()
        x |= {name: x[name].requires_grad_() for name in names}
        outputs = run(x)
        return torch.autograd.grad([o.square().sum() for o in outputs], [x[n] for n in names], allow_unused=True)

    for got, expected in zip(gradients(problem.run), gradients(problem.expected), strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"window": 3}, "neither a window nor slopes"), ({"slopes": torch.ones(4)}, "neither a window nor slopes")],
)
def test_what_needs_an_order_is_an_error(changed, message):
    x = CROSS.tensors(torch.float32)
    first = [x[n] for n in ("query", "row", "past", "attention_mask", "cos", "sin", "key_up", "value_up")]
    with pytest.raises(ValueError, match=message):
        ops.latent_attention(*first, None, changed.get("slopes"), 0.4, changed.get("window", 0), 0.0, 0, False)


def test_causal_attention_has_one_row_per_query():
    x = CROSS.tensors(torch.float32)
    first = [x[n] for n in ("query", "row", "past", "attention_mask", "cos", "sin", "key_up", "value_up")]
    with pytest.raises(ValueError, match="3 queries but 7 new rows"):
        ops.latent_attention(*first, None, None, 0.4, 0, 0.0)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS.values() if not (p.sinks and p.key_scales)], ids=str)
def test_the_operator_fits_its_schema(problem):
    x = problem.tensors(torch.float32)
    first = [x[n] for n in ("query", "row", "past", "attention_mask", "cos", "sin", "key_up", "value_up")]
    torch.library.opcheck(ops.latent_attention, (*first, x.get("sinks"), None, 0.4, 0, problem.softcap, 0, False))


def onnx_results(problem: Problem, x: dict[str, Tensor]) -> list[Tensor]:
    """Of the function's body in ONNX Runtime, in float32."""
    variant = Variant(
        key_scales=bool(problem.key_scales), softcap=bool(problem.softcap), sinks=problem.sinks, bidirectional=True
    )
    names = ["query", "row", "past", "attention_mask", "cos", "sin", "key_up", "value_up"]
    names += ["sinks"] * problem.sinks
    fed = {name: x[name].float() if x[name].is_floating_point() else x[name] for name in names}
    node = helper.make_node(
        variant.named(LATENT),
        names,
        ["output", "present"],
        domain=DOMAIN,
        num_heads=problem.heads,
        rope_groups=problem.rope_groups,
        rope_dim=2 * problem.half,
        latent_rank=problem.rank,
        scale=0.4,
        bidirectional=1,
        **({"key_scales": problem.key_scales} if problem.key_scales else {}),
        **({"softcap": problem.softcap} if problem.softcap else {}),
        **({"has_sinks": 1} if problem.sinks else {}),
    )
    kinds = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    inputs = [
        helper.make_tensor_value_info(n, kinds[v.dtype], [f"{n}{i}" for i in range(v.dim())]) for n, v in fed.items()
    ]
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"{n}{i}" for i in range(d)])
        for n, d in (("output", 4), ("present", 3))
    ]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs),
        functions=[attention_function(LATENT, 23, variant)],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {n: v.numpy() for n, v in fed.items()})]


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_onnx_function_equals_the_reference(problem):
    x = problem.tensors()
    for got, expected in zip(onnx_results(problem, x), problem.expected(x), strict=True):
        torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.parametrize("features", [{}, {"key_scales": True}, {"softcap": True, "sinks": True}], ids=str)
def test_the_onnx_function_has_no_more_than_it_needs(features):
    function = attention_function(LATENT, 23, Variant(bidirectional=True, **features))
    used = {name for node in function.node for name in node.input} | {*function.output}
    assert not {node.output[0] for node in function.node} - used


@settings(max_examples=25)
@given(problems())
def test_the_onnx_function_equals_the_reference_at_any_size(problem):
    x = problem.tensors()
    for got, expected in zip(onnx_results(problem, x), problem.expected(x), strict=True):
        torch.testing.assert_close(got.double(), expected, **CLOSE)
