"""Planning is arithmetic: ranks and cache sizes in closed form."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from mla_compile.config import make_config
from mla_compile.errors import UsageError
from mla_compile.plan import LatentPlan, cache_elements, clamped, liked_ranks, plan_layers
from mla_compile.site import AttentionSite, Projection, Rope, Scores


def projection(heads: int, dim: int) -> Projection:
    rows = tuple(tuple(range(h * dim, (h + 1) * dim)) for h in range(heads))
    return Projection("y", "x", "weight", None, rows, tuple((1.0,) * dim for _ in range(heads)))


def site(
    kv_heads: int, dim: int, *, group: int = 1, v_dim: int | None = None, rotary: int | None = None, index: int = 0
) -> AttentionSite:
    rotary = dim if rotary is None else rotary
    half = rotary // 2
    rope = Rope(tuple((i, i + half) for i in range(half)), tuple(10000.0 ** (-i / max(half, 1)) for i in range(half)))
    value = projection(kv_heads, dim if v_dim is None else v_dim)
    query, key = projection(kv_heads * group, dim), projection(kv_heads, dim)
    return AttentionSite(
        index,
        f"layers.{index}.attention",
        query,
        key,
        value,
        rope,
        Scores(dim**-0.5),
        "out",
        ("b", "h", "s", "d"),
        "softmax",
        0.0,
    )


def plan(layer: AttentionSite, width: int | None = None, **settings: object) -> LatentPlan:
    (only,) = plan_layers([layer], [width or layer.heads * layer.qk_dim], make_config(**settings))
    return only


@pytest.mark.parametrize("heads", [1, 8, 32])
@pytest.mark.parametrize(("latent_per_head", "ratio"), [(64, 0.3125), (32, 0.1875), (16, 0.125)])
def test_ratios_of_the_mha2mla_paper(heads, latent_per_head, ratio):
    """Table 1: heads of 128, r = 8 pairs (16 channels) per head, d_kv per head: -68.75 %, -81.25 %, -87.5 %."""
    layer, rank = site(heads, 128), latent_per_head * heads
    for found in (plan(layer, cache_ratio=ratio, rope_dims=16), plan(layer, kv_rank=rank, rope_dims=16)):
        assert (found.kv_rank, found.rope_groups, found.rope_dims) == (rank, heads, 16)
        assert found.elements_before == heads * 256
        assert found.elements_after == rank + heads * 16
        assert found.elements_after / found.elements_before == ratio


def test_default_is_the_mildest_setting_of_the_paper():
    assert plan(site(32, 128)) == plan(site(32, 128), cache_ratio=0.3125, rope_dims=16)


@pytest.mark.parametrize(("dim", "kept"), [(8, 2), (16, 2), (32, 4), (64, 8), (80, 10), (96, 12), (128, 16), (256, 32)])
def test_an_eighth_of_the_head_keeps_rotating(dim, kept):
    found = plan(site(4, dim))
    assert found.rope_dims == kept
    assert found.rope_dims % 2 == 0


def test_default_rope_dims_do_not_exceed_what_rotates():
    assert plan(site(4, 128, rotary=4)).rope_dims == 4
    assert plan(site(4, 128, rotary=0)).rope_dims == 0


def test_grouped_queries_pay_for_key_value_heads_only():
    """8 query over 2 key/value heads of 64: 256 numbers before; at one half 128, of which 2 x 8 rotate."""
    found = plan(site(2, 64, group=4), cache_ratio=0.5)
    assert (found.elements_before, found.rope_groups, found.rope_dims, found.kv_rank) == (256, 2, 8, 112)


def test_without_rotation_all_of_the_row_is_latent():
    found = plan(site(4, 16, rotary=0), cache_ratio=0.5)
    assert (found.rope_dims, found.kv_rank, found.elements_after) == (0, 64, 64)
    assert found.exact_rank == 64  # 64 key and 64 value rows, read from an activation 64 wide


def test_no_rope_dims_leaves_positions_out_of_a_rotating_layer():
    found = plan(site(2, 16, group=2), rope_dims=0, cache_ratio=0.5)
    assert (found.rope_dims, found.elements_after, found.kv_rank) == (0, 32, 32)


def test_exact_keeps_every_rotating_channel():
    full = plan(site(4, 16), exact=True)
    assert (full.rope_dims, full.kv_rank) == (16, 64)
    assert full.elements_after == full.elements_before  # what does not rotate is only the values
    part = plan(site(4, 16, rotary=8), exact=True)
    assert (part.rope_dims, part.kv_rank) == (8, 64)  # 32 key and 64 value rows, but only 64 columns
    assert part.elements_after < part.elements_before


def test_more_ratio_than_needed_stops_at_the_exact_rank():
    found = plan(site(4, 16, rotary=0), cache_ratio=1.0)
    assert found.kv_rank == found.exact_rank == 64
    assert found.elements_after == 64 < found.elements_before


def test_layers_are_planned_one_by_one_and_summed():
    layers = [site(2, 16, group=2), site(4, 32, v_dim=8, index=1)]
    plans = plan_layers(layers, [64, 128], make_config(cache_ratio=0.5))
    assert [p.path for p in plans] == ["layers.0.attention", "layers.1.attention"]
    assert [p.site for p in plans] == [0, 1]
    assert [p.elements_before for p in plans] == [2 * 32, 4 * 40]
    assert [p.elements_after for p in plans] == [32, 80]
    assert cache_elements(plans) == (64 + 160, 32 + 80)


def test_every_layer_needs_its_width():
    with pytest.raises(ValueError, match="zip"):
        plan_layers([site(2, 16)], [], make_config())


def test_one_rank_in_all_layers_is_the_smallest():
    layers = [site(2, 16, group=2), site(4, 32, index=1)]
    free, uniform = (
        plan_layers(layers, [64, 128], make_config(cache_ratio=0.5, uniform_rank=u)) for u in (False, True)
    )
    assert len({p.kv_rank for p in free}) == 2
    assert {p.kv_rank for p in uniform} == {min(p.kv_rank for p in free)}
    assert [p.rope_dims for p in uniform] == [p.rope_dims for p in free]


def test_ranks_that_kernels_like():
    """From 128 on two tiles of 16 at least, whose lengths are powers of two; the largest gap is a third."""
    tiles = [2**k for k in range(4, 10)]
    expected = sorted({a + b for a in tiles for b in (0, *tiles) if a != b and 128 <= a + b <= 600})
    assert [r for r in liked_ranks(600) if r >= 128] == expected
    small = [r for r in liked_ranks(600) if r < 128]
    assert small == [*range(1, 64), *range(64, 128, 4)]
    assert liked_ranks(0) == []


SITES = st.builds(
    lambda kv_heads, half, group, v_dim, rotary: site(
        kv_heads, 2 * half, group=group, v_dim=v_dim, rotary=2 * min(rotary, half)
    ),
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 16),
)


@given(SITES, st.floats(0.001, 1.0), st.sampled_from(["joint", "split"]), st.integers(1, 200))
def test_a_ratio_is_never_exceeded_and_never_wasted(layer, ratio, svd, width):
    allowed = ratio * layer.elements_per_token + 1e-6
    if int(allowed) < plan(layer, width, kv_rank=1, svd=svd).elements_after:
        with pytest.raises(UsageError, match="leaves no room"):
            plan(layer, width, cache_ratio=ratio, svd=svd)
        return
    found = plan(layer, width, cache_ratio=ratio, svd=svd)
    assert found.elements_after <= allowed
    assert found.kv_rank == found.exact_rank or found.elements_after + 1 > allowed - 1e-6


@given(SITES, st.sampled_from(["joint", "split"]), st.integers(1, 64), st.data())
def test_exact_rank_is_the_rank_of_random_weights(layer, svd, width, data):
    """Oracle: the numerical rank of what is factorised, for weights without any structure."""
    rope_dims = data.draw(st.integers(0, layer.rope.rotary_dim // 2)) * 2
    generator = torch.Generator().manual_seed(0)

    def weights(rows: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    keys, values = weights(layer.kv_heads * (layer.qk_dim - rope_dims)), weights(layer.kv_heads * layer.v_dim)
    parts = [torch.cat([keys, values])] if svd == "joint" else [keys, values]
    rank = sum(int(torch.linalg.matrix_rank(part)) if part.numel() else 0 for part in parts)
    assert plan(layer, width, kv_rank=1, rope_dims=rope_dims, svd=svd).exact_rank == rank
    assert plan(layer, width, kv_rank=rank, rope_dims=rope_dims, svd=svd).kv_rank == rank
    assert plan(layer, width, kv_rank=rank + 1, rope_dims=rope_dims, svd=svd).kv_rank == rank  # more would be zeros


def test_what_is_more_than_there_is_is_clamped_and_told():
    layers = [site(2, 16), site(2, 16, rotary=4, index=1)]
    config = make_config(rope_dims=8, kv_rank=44)
    plans = plan_layers(layers, [64, 64], config)
    assert [(p.rope_dims, p.kv_rank) for p in plans] == [(8, 44), (4, 44)]
    (told,) = clamped(plans, config)
    assert told == "--rope-dims 8 is more than there is in 1 of 2 layers (layers.1.attention: 4)"
    config = make_config(rope_dims=4, kv_rank=99)
    assert clamped(plan_layers(layers, [64, 64], config), config) == [
        "--kv-rank 99 is more than there is in 2 of 2 layers (layers.0.attention: 56)"
    ]


@pytest.mark.parametrize("rope_dims", [None, 16])
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.03])
def test_a_ratio_without_room_for_a_latent_is_refused(ratio, rope_dims):
    with pytest.raises(UsageError, match=r"leaves no room for a latent in layers\.0\.attention") as caught:
        plan(site(2, 16), cache_ratio=ratio, rope_dims=rope_dims)
    assert "--cache-ratio" in caught.value.remedy
    assert "--rope-dims" in caught.value.remedy


@given(SITES)
def test_the_ratio_that_is_recommended_works(layer):
    assume(plan(layer, 64, kv_rank=1).elements_after <= layer.elements_per_token)  # else no ratio up to 1 would do
    with pytest.raises(UsageError) as caught:
        plan(layer, 64, cache_ratio=1e-9)
    named = re.search(r"--cache-ratio (\S+)", caught.value.remedy)
    assert named
    assert plan(layer, 64, cache_ratio=float(named[1])).kv_rank == 1
