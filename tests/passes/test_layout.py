"""Axes are named by what they are, and brought to a plain order and back."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch

from mla_compile.passes.einsum import einsum_parts
from mla_compile.passes.layout import SHORT, Layout, Sizes, attended_layout, score_layouts, token_axes
from mla_compile.passes.mismatch import MismatchError

SIZES = {"b": 2, "h": 3, "s": 5, "d": 4}


@pytest.mark.parametrize("axes", list(itertools.permutations("bhsd")), ids="".join)
def test_any_order_of_axes_is_undone(axes):
    x = torch.arange(2 * 3 * 5 * 4).reshape([SIZES[a] for a in axes])
    plain = Layout(axes).arrange(x, "bshd", 2)
    assert plain.shape == (2, 5, 3, 4)
    assert torch.equal(plain, torch.einsum(f"{''.join(axes)}->bshd", x))
    assert torch.equal(Layout(axes).place(plain, "bshd", x.shape), x)


def test_merged_batch_and_heads():
    x = torch.arange(2 * 3 * 5 * 4).reshape(6, 5, 4)
    plain = Layout(("bh", "s", "d")).arrange(x, "bshd", 2)
    assert torch.equal(plain, x.view(2, 3, 5, 4).transpose(1, 2))
    assert torch.equal(Layout(("bh", "s", "d")).place(plain, "bshd", x.shape), x)


def test_heads_on_two_axes_are_flattened_in_order():
    x = torch.randn(2, 3, 5, 2, 4)
    layout = Layout(("b", "h", "s", "h", "d"))
    plain = layout.arrange(x, "bshd", 2)
    assert torch.equal(plain, x.permute(0, 2, 1, 3, 4).reshape(2, 5, 6, 4))
    assert torch.equal(layout.place(plain, "bshd", x.shape), x)


def test_a_missing_axis_is_of_size_one():
    assert Layout(("b", "s", "d")).arrange(torch.zeros(2, 5, 4), "bshd", 2).shape == (2, 5, 1, 4)


def test_symbols_tell_batch_and_length(programs):
    program = programs["llama-gqa"].program
    sizes = Sizes.of(program)
    nodes = {n.name: n for n in program.exported.graph.nodes}
    ids = nodes[program.tokens].meta["val"]
    batch, length = ids.shape
    assert token_axes(sizes, (batch, length, 7, 3)) == ("b", "s", "d", "d")
    assert token_axes(sizes, (length, batch, 7)) == ("s", "b", "d")
    assert token_axes(sizes, (batch * length, 7)) == ("bs", "d")
    assert sizes.leading((batch, 4)) == ("b", "h")
    assert sizes.leading((4 * batch,)) == ("bh",)
    assert sizes.bind((batch, 3, length), 2, 5) == [2, 3, 5]
    for wrong in ((batch, 7), (7, 3), (batch, length, length)):
        with pytest.raises(MismatchError):
            token_axes(sizes, wrong)
    with pytest.raises(MismatchError):
        sizes.leading((batch + 1,))


def test_letters_of_einsums(zoo_programs):
    import zoo

    from mla_compile.passes.trace import DataFlow, find_anchors

    program = zoo_programs[zoo.ByEinsum]
    (anchor,) = find_anchors(DataFlow(program), program)
    sizes = Sizes.of(program)
    query, key, scores = score_layouts(sizes, anchor.scores, anchor.query, anchor.key)
    assert (query.axes, key.axes, scores.axes) == (("b", "h", "s", "d"), ("b", "h", "t", "d"), ("b", "h", "s", "t"))
    weights, value, output = attended_layout(sizes, anchor.output, anchor.probabilities, anchor.value)
    assert (weights.axes, value.axes, output.axes) == (
        ("b", "h", "s", "t"),
        ("b", "h", "t", "d"),
        ("b", "h", "s", "d"),
    )


@pytest.mark.parametrize(
    "equation", ["ab,bc", "ba", "b a , c a", "aBc,cb", "...ab,...b", "ab...->...", "ii,ia", "ab,ac->bc"]
)
def test_outputs_that_are_not_written(equation):
    """Oracle: torch's result of the equation as it is, and with the output that was found."""
    sizes = dict(zip("abcBi", range(2, 7), strict=True))
    shapes = [
        [n for c in part.strip().replace("...", ".") for n in ([3, 2] if c == "." else [sizes[c]])]
        for part in equation.split("->")[0].replace(" ", "").split(",")
    ]
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator) for shape in shapes]
    parts, output = einsum_parts(equation)
    assert torch.equal(torch.einsum(equation, *operands), torch.einsum(f"{','.join(parts)}->{output}", *operands))


def cross_sizes(queries, keys):
    """Sizes of a layer with so many queries and keys, in a model with symbols for batch, both lengths and one more."""
    batch, *rest = sympy.symbols("b s t u", positive=True, integer=True)
    named = dict(zip("stu", rest, strict=True))
    given = [named.get(x, x) for x in (queries, keys)]
    others = tuple((symbol, 7) for symbol in rest if symbol not in given)
    return Sizes(batch, *given, (), others), batch, named


def test_lengths_of_cross_attention_differ_in_probes():
    sizes, batch, named = cross_sizes("s", "t")
    assert (sizes.cross, sizes.fixed, sizes.short) == (True, False, SHORT)
    bound = sizes.symbols(3, 20)
    assert (bound[batch], bound[named["s"]], bound[named["u"]]) == (3, 20, 7)
    assert bound[named["t"]] == sizes.key_length(20) != 20
    keys = sizes.of_keys()
    assert not keys.cross
    assert keys.symbols(3, 20)[named["t"]] == 20


@pytest.mark.parametrize(("queries", "keys"), [(17, 17), ("s", 17), (6, "t"), (6, 17)])
def test_lengths_that_are_numbers_stay(queries, keys):
    sizes, *_ = cross_sizes(queries, keys)
    assert sizes.fixed == isinstance(queries, int)
    assert sizes.short == (queries if sizes.fixed else SHORT)
    assert sizes.of_keys().short == (keys if isinstance(keys, int) else SHORT)
    if isinstance(keys, int):
        assert sizes.key_length(sizes.short) == keys


def test_a_width_like_the_number_of_tokens_is_a_width():
    sizes, batch, _ = cross_sizes(16, 16)
    node = type("Node", (), {"expr": batch})()
    symbol = type("SymInt", (), {"node": node})()
    assert token_axes(sizes, (symbol, 16, 16)) == ("b", "s", "d")
    assert token_axes(sizes, (16, symbol, 16)) == ("s", "b", "d")
