"""What a decoding step costs in an attention layer before and after: bytes, operations, and which of them take longer.

A plain cache is read once and hardly computed with, so that reading it takes the time. Latent attention reads far less
and multiplies more, for every head attends to all of the latent: beyond some rank that takes longer than was saved.
Pure arithmetic on sites and plans; no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from mla_compile.plan import LatentPlan
from mla_compile.site import AttentionSite

__all__ = [
    "MACHINES",
    "DecodeStep",
    "LayerCost",
    "Machine",
    "StepCost",
    "decode_costs",
    "slower_layers",
    "summed_costs",
]


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates of a kind of machine.

    Attributes:
        name: What it is.
        itemsize: Bytes of a number in caches and weights.
        bandwidth: Bytes read per second.
        plain: Operations per second of plain attention: products of a cached matrix with the few queries that share it.
        folded: Operations per second of latent attention, where all heads share the cached matrix.
    """

    name: str
    itemsize: int
    bandwidth: float
    plain: float
    folded: float


MACHINES = {
    "cpu": Machine("one core of a server CPU, float32", 4, 25e9, 17e9, 85e9),
    "gpu": Machine("an H200 by its data sheet, bfloat16", 2, 4.8e12, 989e12, 989e12),
}
"""Those of the CPU fit benchmarks/decode_cpu.md (one core with AVX-512, ONNX Runtime, the fused kernel); those of the
GPU were not measured."""


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One new token for each of some sequences.

    Attributes:
        machine: What it runs on.
        context: Tokens in the cache.
        batch: Sequences.
    """

    machine: Machine
    context: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class StepCost:
    """One layer's part of a decoding step, up to the attention output of every head.

    Attributes:
        cache_bytes: Read of the cache, for one sequence.
        weight_bytes: Read of the weights, once for all sequences.
        attention_operations: Multiplications and additions with the cache, for one sequence.
        weight_operations: Multiplications and additions with weights, for one sequence.
    """

    cache_bytes: int
    weight_bytes: int
    attention_operations: int
    weight_operations: int

    def seconds(self, step: DecodeStep, rate: float) -> float:
        """The longer of reading and computing, for the weights and for the cache.

        Args:
            step: What is computed, and on what.
            rate: Operations per second of this kind of attention.
        """
        machine = step.machine
        weights = max(self.weight_bytes / machine.bandwidth, step.batch * self.weight_operations / machine.folded)
        cache = max(self.cache_bytes / machine.bandwidth, self.attention_operations / rate)
        return weights + step.batch * cache


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A layer's part of a decoding step.

    Attributes:
        path: Module path of the layer.
        before: With a plain cache.
        after: With the latent one, attended to as it lies.
        speedup: Estimated time before over after.
    """

    path: str
    before: StepCost
    after: StepCost
    speedup: float


def decode_costs(
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    widths: Sequence[int],
    step: DecodeStep,
) -> tuple[LayerCost, ...]:
    """Cost of a decoding step, layer by layer.

    A window shortens the context. Keys are taken to come out of the latent in all their channels, which is at most
    what they do.

    Args:
        sites: The layers.
        plans: Shape of each one's latent cache.
        widths: Input width of each one's projections.
        step: What is computed, and on what.
    """
    machine, costs = step.machine, []
    for site, plan, width in zip(sites, plans, widths, strict=True):
        seen = min(step.context, site.mask.window or step.context)
        before, after = _plain(site, width, seen, machine.itemsize), _folded(site, plan, width, seen, machine.itemsize)
        speedup = before.seconds(step, machine.plain) / after.seconds(step, machine.folded)
        costs.append(LayerCost(site.path, before, after, speedup))
    return tuple(costs)


def summed_costs(costs: Sequence[LayerCost], step: DecodeStep) -> dict[str, dict[str, float]]:
    """A step of all layers together, as data: what it reads, computes and takes, ``before`` and ``after``.

    Args:
        costs: Those of every layer.
        step: What they were estimated for.
    """
    sides = {
        "before": ([c.before for c in costs], step.machine.plain),
        "after": ([c.after for c in costs], step.machine.folded),
    }
    return {
        side: {
            **{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(StepCost)},
            "seconds": sum(part.seconds(step, rate) for part in parts),
        }
        for side, (parts, rate) in sides.items()
    }


def slower_layers(costs: Sequence[LayerCost], step: DecodeStep) -> str | None:
    """Say which layers would decode slower than they did, if any would."""
    slow = [c for c in costs if c.speedup < 1]
    if not slow:
        return None
    worst = min(slow, key=lambda c: c.speedup)
    return (
        f"{len(slow)} of {len(costs)} layers are expected to decode slower than before at {step.context} tokens and "
        f"batch {step.batch} on {step.machine.name} ({worst.path}: x{worst.speedup:.2f}); a smaller rank computes less"
    )


def _plain(site: AttentionSite, width: int, seen: int, itemsize: int) -> StepCost:
    rows = site.heads * site.qk_dim + site.kv_heads * site.qk_dim + site.value_rows
    return StepCost(
        cache_bytes=seen * site.elements_per_token * itemsize,
        weight_bytes=width * rows * itemsize,
        attention_operations=2 * seen * site.heads * (site.qk_dim + site.v_dim),
        weight_operations=2 * width * rows,
    )


def _folded(site: AttentionSite, plan: LatentPlan, width: int, seen: int, itemsize: int) -> StepCost:
    rows = site.heads * (site.qk_dim + plan.rope_dims) + plan.elements_after
    key_rows = site.kv_heads * site.qk_dim
    return StepCost(
        cache_bytes=seen * plan.elements_after * itemsize,
        weight_bytes=(width * rows + plan.kv_rank * (key_rows + site.value_rows)) * itemsize,
        attention_operations=2 * seen * site.heads * (2 * plan.kv_rank + plan.rope_dims),
        weight_operations=2 * (width * rows + plan.kv_rank * site.heads * (site.qk_dim + site.v_dim)),
    )
