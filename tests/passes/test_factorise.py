"""Partial RoPE and SVD, against the formulas of the MHA2MLA paper (arXiv 2502.14837) and linear algebra."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mla_compile.config import make_config
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.calibrate import PairNorms
from mla_compile.passes.factorise import factorise_mha2mla, select_pairs
from mla_compile.passes.low_rank import truncated_svd
from mla_compile.passes.weights import HeadWeights, SiteWeights
from mla_compile.plan import plan_layers
from mla_compile.runtime import reference
from mla_compile.site import AttentionSite, Projection, Rope, Scores

# Both sides compute in float64 on numbers of size one; an SVD multiplies the rounding of 1e-16 by some tens.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention layer; the first channels of a head rotate, in half-split pairs."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    pairs: int = 3
    v_dim: int = 5
    width: int = 32

    def site(self) -> AttentionSite:
        def projection(heads: int, dim: int) -> Projection:
            rows = tuple(tuple(range(h * dim, (h + 1) * dim)) for h in range(heads))
            return Projection("y", "x", "w", "b", rows, ((1.0,) * dim,) * heads)

        return AttentionSite(
            index=0,
            path="layer",
            query=projection(self.heads, self.dim),
            key=projection(self.kv_heads, self.dim),
            value=projection(self.kv_heads, self.v_dim),
            rope=Rope(tuple((i, i + self.pairs) for i in range(self.pairs)), tuple(0.7**i for i in range(self.pairs))),
            scores=Scores(0.3),
            output="o",
            output_axes=("b", "h", "s", "d"),
            softmax="s",
            error=0.0,
        )

    def weights(self, seed: int = 0) -> SiteWeights:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> HeadWeights:
            weight = torch.randn(*shape, self.width, generator=generator, dtype=torch.float64) / math.sqrt(self.width)
            bias = torch.randn(shape, generator=generator, dtype=torch.float64)
            return HeadWeights(weight, bias, torch.zeros_like(bias))

        return SiteWeights(draw(self.heads, self.dim), draw(self.kv_heads, self.dim), draw(self.kv_heads, self.v_dim))

    def factorise(self, seed: int = 0, **settings: object) -> LatentWeights:
        config = make_config(**{"selection": "uniform", **settings})
        (plan,) = plan_layers([self.site()], [self.width], config)
        return factorise_mha2mla(self.site(), self.weights(seed), plan, config, None)


SHAPES = {
    "grouped": Shape(),
    "one key head": Shape(kv_heads=1),
    "key head per query head": Shape(kv_heads=4),
    "no rope": Shape(pairs=0),
    "all channels rotate": Shape(pairs=4),
    "narrow input": Shape(width=7),
}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    return Shape(
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dim=dim,
        pairs=draw(st.integers(0, dim // 2)),
        v_dim=draw(st.integers(1, 6)),
        width=draw(st.integers(1, 40)),
    )


# ---- which pairs keep rotating (section 3.1 of the paper)


def falling(count: int) -> AttentionSite:
    return Shape(dim=2 * count, pairs=count).site()


@pytest.mark.parametrize(("total", "kept"), [(8, 1), (8, 3), (8, 8), (32, 4), (7, 2), (7, 3)])
def test_high_low_and_uniform_follow_the_paper(total, kept):
    """``S_high = {0..r-1}``, ``S_low = {D/2-r..D/2-1}``, ``S_uniform = {floor(k D / 2r)}``."""
    site = falling(total)
    assert select_pairs(site, kept, "high", None) == [list(range(kept))] * 2
    assert select_pairs(site, kept, "low", None) == [list(range(total - kept, total))] * 2
    assert select_pairs(site, kept, "uniform", None) == [[math.floor(k * total / kept) for k in range(kept)]] * 2


@given(st.permutations(range(6)), st.integers(1, 6))
def test_rank_is_by_frequency_and_not_by_channel(order, kept):
    frequencies = tuple(0.5**rank for rank in order)
    site = falling(6)
    site = AttentionSite(
        **{f: getattr(site, f) for f in site.__slots__ if f != "rope"}, rope=Rope(site.rope.pairs, frequencies)
    )
    for selection, ranks in (("high", range(kept)), ("low", range(6 - kept, 6))):
        assert select_pairs(site, kept, selection, None) == [[order.index(rank) for rank in ranks]] * 2


@given(st.integers(1, 8), st.integers(0, 2**16))
def test_two_norm_keeps_the_largest_products_of_every_group(kept, seed):
    """Per key/value head, the top r of ``sum_h mean|q_h| * mean|k|``."""
    generator = torch.Generator().manual_seed(seed)
    norms = PairNorms(*(torch.rand(n, 8, generator=generator, dtype=torch.float64) for n in (4, 2)))
    found = select_pairs(falling(8), kept, "2-norm", norms)
    for group, chosen in enumerate(found):
        scores = (norms.query[2 * group] + norms.query[2 * group + 1]) * norms.key[group]
        assert chosen == sorted(scores.topk(kept).indices.tolist())


def test_two_norm_of_equal_pairs_prefers_high_frequencies():
    norms = PairNorms(torch.ones(4, 8).double(), torch.ones(2, 8).double())
    assert select_pairs(falling(8), 3, "2-norm", norms) == [[0, 1, 2]] * 2


def test_two_norm_needs_measurements():
    with pytest.raises(ValueError, match="needs norms that were measured on text"):
        select_pairs(falling(8), 3, "2-norm", None)


# ---- the decomposition


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**16))
def test_truncated_svd_is_the_best_approximation(rows, width, rank, seed):
    """Eckart-Young: the error is the norm of the singular values that are left out."""
    matrix = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made = truncated_svd(matrix, rank)
    up, down = made.up, made.down
    assert (up.shape, down.shape) == ((rows, rank), (rank, width))
    error = torch.linalg.matrix_norm(matrix - up @ down)
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[rank:].norm(), **EXACT)
    used = min(rank, rows, width)
    torch.testing.assert_close(down[:used] @ down[:used].T, torch.eye(used).double(), **EXACT)
    torch.testing.assert_close(up[:, :used].norm(dim=0), torch.linalg.svdvals(matrix)[:used], **EXACT)
    assert not up[:, used:].any()
    assert not down[used:].any()


def test_truncated_svd_has_reproducible_signs():
    """Turning a component round is the same decomposition; the largest entry of ``down`` is the positive one."""
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made, negated = truncated_svd(matrix, 4), truncated_svd(-matrix, 4)
    assert (made.down.gather(1, made.down.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(negated.down, made.down, **EXACT)
    torch.testing.assert_close(negated.up, -made.up, **EXACT)


def test_truncated_svd_of_nothing_is_nothing():
    made = truncated_svd(torch.zeros(3, 4).double(), 2)
    assert not (made.up @ made.down).any()


def stacked(shape: Shape, weights: SiteWeights, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of all key heads that do not rotate, and of all value heads."""
    turning = {c for i in chosen for c in shape.site().rope.pairs[i]}
    still = [c for c in range(shape.dim) if c not in turning]
    return weights.key.weight[:, still].flatten(0, 1), weights.value.weight.flatten(0, 1)


def up_projections(latent: LatentWeights) -> tuple[torch.Tensor, torch.Tensor]:
    return latent.key_up.flatten(0, 1), latent.value_up.mT.flatten(0, 1)


def down_projection(latent: LatentWeights) -> torch.Tensor:
    return latent.row[: latent.key_up.shape[2]]


@given(shapes(), st.sampled_from(["joint", "split"]), st.integers(0, 2**16))
def test_exact_rank_reproduces_keys_and_values(shape: Shape, svd, seed):
    latent = shape.factorise(seed, exact=True, svd=svd)
    expected = stacked(shape, shape.weights(seed), list(range(shape.pairs)))
    for up, rows in zip(up_projections(latent), expected, strict=True):
        torch.testing.assert_close(up @ down_projection(latent), rows, **EXACT)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("rope_dims", [0, 2, 6])
def test_residual_of_joint_factors_is_the_tail_of_the_stack(rank, rope_dims):
    shape = Shape()
    latent = shape.factorise(kv_rank=rank, rope_dims=rope_dims, svd="joint", selection="high")
    stack = torch.cat(stacked(shape, shape.weights(), list(range(rope_dims // 2))))
    error = torch.linalg.matrix_norm(torch.cat(up_projections(latent)) @ down_projection(latent) - stack)
    torch.testing.assert_close(error, torch.linalg.svdvals(stack)[rank:].norm(), **EXACT)


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_residuals_of_split_factors_are_the_tails_of_keys_and_values(rank):
    shape = Shape()
    latent = shape.factorise(kv_rank=rank, rope_dims=2, svd="split", selection="high")
    ranks = (rank // 2, rank - rank // 2)
    parts = zip(up_projections(latent), stacked(shape, shape.weights(), [0]), ranks, strict=True)
    for up, rows, share in parts:
        error = torch.linalg.matrix_norm(up @ down_projection(latent) - rows)
        torch.testing.assert_close(error, torch.linalg.svdvals(rows)[share:].norm(), **EXACT)


@given(shapes(), st.sampled_from(["joint", "split"]), st.data())
def test_worth_is_what_a_shorter_latent_leaves_out(shape: Shape, svd, data):
    """What reports draw: of every rank, measured on the layer that this rank really makes."""
    settings = {"svd": svd, "selection": "high", "rope_dims": 2 * data.draw(st.integers(0, shape.pairs))}
    stack = torch.cat(stacked(shape, shape.weights(), list(range(settings["rope_dims"] // 2))))
    latent = shape.factorise(kv_rank=1, **settings)
    assume(latent.worth is not None)  # where one entry is all that keys or values have
    torch.testing.assert_close(latent.worth.sum(), stack.square().sum(), **EXACT)
    rank = data.draw(st.integers(1, len(latent.worth)))
    shorter = shape.factorise(kv_rank=rank, **settings)
    residual = torch.cat(up_projections(shorter)) @ down_projection(shorter) - stack
    torch.testing.assert_close(residual.square().sum(), latent.worth[rank:].sum(), **EXACT)


def test_a_layer_that_leaves_nothing_out_does_not_know_what_others_would():
    assert Shape().factorise(exact=True).worth is None, "a basis in no order is all that it takes"


@pytest.mark.parametrize(
    "shape", [Shape(), Shape(v_dim=1), Shape(dim=6, pairs=3)], ids=["few keys", "few values", "no keys"]
)
def test_split_gives_to_one_side_what_the_other_cannot_use(shape):
    """Keys have ``2 * still`` rows and values ``2 * v_dim``; no component of the latent may be wasted."""
    (plan,) = plan_layers([shape.site()], [shape.width], make_config(exact=True, svd="split"))
    for rank in range(1, plan.exact_rank + 1):
        latent = shape.factorise(kv_rank=rank, rope_dims=2 * shape.pairs, svd="split")
        by_keys, by_values = ((up != 0).any(0) for up in up_projections(latent))
        assert (by_keys ^ by_values).all(), "every component serves keys or values, and not both"


@pytest.mark.parametrize("selection", ["high", "low", "uniform"])
def test_rotating_channels_are_untouched_and_ordered_real_then_imaginary(selection):
    shape = Shape()
    weights, site = shape.weights(), shape.site()
    latent = shape.factorise(kv_rank=3, rope_dims=4, selection=selection)
    chosen = select_pairs(site, 2, selection, None)[0]
    channels = [site.rope.pairs[i][0] for i in chosen] + [site.rope.pairs[i][1] for i in chosen]
    still = [c for c in range(shape.dim) if c not in channels]
    assert torch.equal(latent.query, weights.query.weight[:, still + channels])
    assert torch.equal(latent.query_bias, weights.query.bias[:, still + channels])
    assert torch.equal(latent.row[3:], weights.key.weight[:, channels].flatten(0, 1))
    assert torch.equal(latent.row_bias[3:], weights.key.bias[:, channels].flatten())
    assert not latent.row_bias[:3].any(), "a bias in the latent would leak into keys and values"
    assert latent.inv_freq.tolist() == [[site.rope.inv_freq[i] for i in chosen]] * shape.kv_heads


def test_every_key_head_keeps_its_own_pairs():
    shape = Shape()
    norms = PairNorms(torch.ones(4, 3).double(), torch.tensor([[9.0, 1.0, 1.0], [1.0, 1.0, 9.0]]).double())
    config = make_config(selection="2-norm", rope_dims=2, kv_rank=4)
    (plan,) = plan_layers([shape.site()], [shape.width], config)
    latent = factorise_mha2mla(shape.site(), shape.weights(), plan, config, norms)
    frequency = shape.site().rope.inv_freq
    assert latent.inv_freq.tolist() == [[frequency[0]], [frequency[2]]]
    for head, channels in enumerate([[0, 3], [0, 3], [2, 5], [2, 5]]):
        assert torch.equal(latent.query[head, -2:], shape.weights().query.weight[head, channels])


# ---- biases


def attention(shape: Shape, weights: SiteWeights, x: torch.Tensor, pairs: list[int]) -> torch.Tensor:
    """The original layer, of whose rotary pairs only some rotate."""
    query, key, value = (
        torch.einsum("bsw,hdw->bshd", x, w.weight) + w.bias for w in (weights.query, weights.key, weights.value)
    )
    rope = shape.site().rope
    chosen, speeds = [rope.pairs[i] for i in pairs], [rope.inv_freq[i] for i in pairs]
    return reference.attention(query, key, value, chosen, speeds, shape.site().scale, None)


def latent_attention(shape: Shape, latent: LatentWeights, x: torch.Tensor) -> torch.Tensor:
    """The same layer from its latent weights."""

    def biased(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return y if bias is None else y + bias

    angle = torch.arange(x.shape[1])[:, None, None] * latent.inv_freq
    output, _ = reference.latent_attention(
        biased(torch.einsum("bsw,hdw->bshd", x, latent.query), latent.query_bias),
        biased(x @ latent.row.T, latent.row_bias),
        x.new_zeros(x.shape[0], 0, latent.row.shape[0]),
        torch.ones(x.shape[:2], dtype=torch.long),
        angle.cos().expand(x.shape[0], -1, -1, -1),
        angle.sin().expand(x.shape[0], -1, -1, -1),
        latent.key_up,
        latent.value_up,
        shape.site().scale,
        None,
    )
    return biased(output, latent.output_bias)


def activations(shape: Shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 6, shape.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("svd", ["joint", "split"])
@pytest.mark.parametrize("name", SHAPES)
def test_biases_are_placed_exactly(name, svd):
    shape = SHAPES[name]
    x = activations(shape)
    expected = attention(shape, shape.weights(), x, list(range(shape.pairs)))
    torch.testing.assert_close(latent_attention(shape, shape.factorise(exact=True, svd=svd), x), expected, **EXACT)


@given(shapes(), st.sampled_from(["joint", "split"]), st.data())
def test_full_rank_with_fewer_pairs_is_the_layer_with_fewer_rotations(shape: Shape, svd, data):
    """What partial RoPE drops is the rotation and nothing else, biases included."""
    kept = data.draw(st.integers(0, shape.pairs))
    rope_dims = 2 * kept
    key_rows, value_rows = shape.kv_heads * (shape.dim - rope_dims), shape.kv_heads * shape.v_dim
    full = (
        min(shape.width, key_rows + value_rows)
        if svd == "joint"
        else min(shape.width, key_rows) + min(shape.width, value_rows)
    )
    x = activations(shape)
    latent = shape.factorise(rope_dims=rope_dims, kv_rank=full, svd=svd, selection="high")
    expected = attention(shape, shape.weights(), x, list(range(kept)))
    torch.testing.assert_close(latent_attention(shape, latent, x), expected, **EXACT)


def test_layers_without_biases_get_none():
    shape = Shape()
    weights = SiteWeights(*(HeadWeights(w.weight, 0 * w.bias, w.shift) for w in vars(shape.weights()).values()))
    config = make_config(exact=True, selection="uniform")
    (plan,) = plan_layers([shape.site()], [shape.width], config)
    latent = factorise_mha2mla(shape.site(), weights, plan, config, None)
    assert (latent.query_bias, latent.row_bias, latent.output_bias) == (None, None, None)
