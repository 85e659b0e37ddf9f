"""What a decoding step costs: bytes and operations in closed form, times against ones that were measured."""

from __future__ import annotations

import dataclasses

import pytest

from mla_compile.cost import MACHINES, DecodeStep, Machine, StepCost, decode_costs, slower_layers
from mla_compile.plan import LatentPlan
from mla_compile.site import AttentionSite, Mask, Projection, Rope, Scores

CPU = MACHINES["cpu"]


def layer(heads: int, kv_heads: int, dim: int, window: int | None = None) -> AttentionSite:
    def projection(count: int) -> Projection:
        rows = tuple(tuple(range(h * dim, (h + 1) * dim)) for h in range(count))
        return Projection("y", "x", "weight", None, rows, tuple((1.0,) * dim for _ in range(count)))

    half = dim // 2
    rope = Rope(tuple((i, i + half) for i in range(half)), (1.0,) * half)
    scores = Scores(dim**-0.5) if window is None else Scores(dim**-0.5, mask=Mask(window=window))
    keys = projection(kv_heads)
    return AttentionSite(0, "attention", projection(heads), keys, keys, rope, scores, "out", (), "softmax", 0.0)


def latent(site: AttentionSite, rank: int, rope_dims: int, groups: int = 1) -> LatentPlan:
    return LatentPlan(0, site.path, groups, rope_dims, rank, 4096, site.elements_per_token)


def cost(site: AttentionSite, plan: LatentPlan, context: int, batch: int = 1, machine: Machine = CPU):
    (found,) = decode_costs([site], [plan], [site.heads * site.qk_dim], DecodeStep(machine, context, batch))
    return found


def test_bytes_and_operations_are_counted():
    """8 query over 2 key/value heads of 4, width 32; a latent of 5 and a shared rope key of 2; 10 tokens, float32."""
    site = layer(8, 2, 4)
    found = cost(site, latent(site, 5, 2), 10)
    assert found.before == StepCost(
        cache_bytes=10 * (2 * 4 + 2 * 4) * 4,
        weight_bytes=32 * (8 * 4 + 2 * 4 + 2 * 4) * 4,
        attention_operations=10 * 8 * 2 * (4 + 4),
        weight_operations=2 * 32 * (8 * 4 + 2 * 4 + 2 * 4),
    )
    assert found.after == StepCost(
        cache_bytes=10 * (5 + 2) * 4,
        weight_bytes=(32 * (8 * (4 + 2) + 5 + 2) + 5 * (2 * 4 + 2 * 4)) * 4,
        attention_operations=10 * 8 * 2 * (5 + 2 + 5),
        weight_operations=2 * (32 * (8 * (4 + 2) + 5 + 2) + 8 * 5 * (4 + 4)),
    )


def test_rope_keys_per_head_are_cached_each_and_read_by_their_own_heads():
    site = layer(8, 2, 4)
    found = cost(site, latent(site, 5, 2, groups=2), 10).after
    assert found.cache_bytes == 10 * (5 + 2 * 2) * 4
    assert found.attention_operations == 10 * 8 * 2 * (5 + 2 + 5)


def test_a_window_is_all_that_is_read():
    narrow, wide = layer(8, 2, 4, window=16), layer(8, 2, 4)
    assert cost(narrow, latent(narrow, 5, 2), 1000) == cost(wide, latent(wide, 5, 2), 16)
    assert cost(narrow, latent(narrow, 5, 2), 10) == cost(wide, latent(wide, 5, 2), 10)


def test_a_batch_shares_the_weights_and_nothing_else():
    step = StepCost(cache_bytes=100, weight_bytes=1000, attention_operations=7, weight_operations=20)
    machine = Machine("", 4, bandwidth=1.0, plain=1.0, folded=1.0)
    assert step.seconds(DecodeStep(machine, 1, 2), 1.0) == 1000 + 2 * 100
    assert step.seconds(DecodeStep(machine, 1, 100), 0.01) == 100 * 20 + 100 * 700  # computing takes longer now


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rank", "rope", "groups", "context", "milliseconds"),
    [
        (32, 32, 128, 512, 64, 1, 4096, (5.2, 3.4)),
        (32, 32, 128, 512, 64, 1, 16384, (20.3, 12.5)),
        (32, 8, 64, 128, 32, 1, 4096, (2.1, 1.0)),
        (32, 8, 64, 128, 32, 1, 16384, (8.0, 3.6)),
        (32, 8, 64, 256, 16, 8, 4096, (2.3, 2.1)),
        (32, 8, 64, 256, 16, 8, 16384, (8.0, 7.5)),
    ],
)
def test_times_of_attention_are_near_measured_ones(heads, kv_heads, dim, rank, rope, groups, context, milliseconds):
    """benchmarks/decode_cpu.md without the up-projections' reading: the best original, and the fused kernel."""
    site = layer(heads, kv_heads, dim)
    found = cost(site, latent(site, rank, rope, groups), context)
    step = DecodeStep(CPU, context)
    for part, rate, measured in zip((found.before, found.after), (CPU.plain, CPU.folded), milliseconds, strict=True):
        alone = dataclasses.replace(part, weight_bytes=0, weight_operations=0)
        assert 1e3 * alone.seconds(step, rate) == pytest.approx(measured, rel=0.25)


def test_layers_that_would_be_slower_are_told_with_the_number():
    site = layer(32, 8, 64)
    small, large = (cost(site, latent(site, rank, 32), 16384) for rank in (128, 768))
    step = DecodeStep(CPU, 16384)
    assert small.speedup > 1.4
    assert slower_layers([small], step) is None
    told = slower_layers([small, large], step)
    assert told is not None
    assert told.startswith("1 of 2 layers are expected to decode slower than before at 16384 tokens and batch 1 on one")
    assert f"attention: x{large.speedup:.2f}" in told
