"""What ``inspect`` and ``plan`` know of every layer: a table, or data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mla_compile.display.console import print_table, say, tell, warn

if TYPE_CHECKING:
    from mla_compile.conversion_cost import ConversionCost, TextCost
    from mla_compile.cost import DecodeStep, LayerCost
    from mla_compile.plan import LatentPlan


__all__ = ["conversion_row", "plan_rows", "show_conversion", "show_layers", "show_plan", "show_verdict"]

_SLOWED = 1.001
"""From this on frequencies are called slowed."""
_SCALED = 1e-4
"""Relative difference from one over the root of the head's size from which a logit scale is shown."""


def show_layers(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row per attention layer, recognised or not."""
    if not rows:
        say("No attention was found.")
        return
    lines = []
    for row in rows:
        if "rejected" in row and "kind" not in row:
            cached = row.get("elements_per_token", "")
            verdict = f"kept: {row['rejected']}" if row["kept"] else f"no: {row['rejected']}"
            lines.append([row["index"], row["path"], verdict, row["reason"], "", "", "", cached, ""])
            continue
        rope = _rope_in_words(row)
        heads = f"{row['heads']} q / {row['kv_heads']} kv of {row['qk_dim']}"
        names = dict.fromkeys(str(row[r]).removeprefix(f"{row['path']}.") for r in ("query", "key", "value"))
        weights = ", ".join(names) + (" (biased)" if row["bias"] else "")
        cached = row["cache"]
        if row["elements_per_token"]:
            lossless = row["lossless_elements_per_token"] / row["elements_per_token"]
            cached = f"{row['elements_per_token']}" + (f" (lossless: {lossless:.0%})" if lossless < 1 else "")
        verdict = f"no: {row['rejected']}" if "rejected" in row else "yes"
        lines.append([row["index"], row["path"], verdict, heads, rope, row["mask"], _extras(row), cached, weights])
    columns = ["#", "layer", "converts", "heads", "rope", "mask", "also", "numbers cached", "weights"]
    print_table("Attention layers", columns, lines)


def show_verdict(rows: Sequence[Mapping[str, Any]], model: str, *, encoders: bool) -> None:
    """How many layers convert, of a model that is not refused, and what comes next: on standard error."""
    converted = sum("rejected" not in row for row in rows)
    others = f", {len(rows) - converted} stay as they are" if converted < len(rows) else ""
    words = ["mla-compile", "plan", model, *(["--encoders"] if encoders else ["--calibration", "TEXT"])]
    tell(f"{converted} of {len(rows)} attention layers convert{others}; sizes: {shlex.join(words)}")


def _rope_in_words(row: Mapping[str, Any]) -> str:
    """Layout, channels, base, and how much slower the frequencies are than the base says."""
    if not row["rotary_dim"]:
        return "none"
    words = f"{row['rope']}:{row['rotary_dim']}"
    if row["rope_theta"] is None:
        return words
    least, most = row["rope_slowing"]
    slowed = "" if most < _SLOWED else f", slowed {most:.3g}x" if least > _SLOWED else f", slowed up to {most:.3g}x"
    return f"{words}, theta {row['rope_theta']:.6g}{slowed}"


def _extras(row: Mapping[str, Any]) -> str:
    """What a layer has beyond plain attention, in a few words."""
    found = []
    factors = [scale * row["qk_dim"] ** 0.5 for scale in row["logit_scales"] or ()]
    if row["logit_scale"] is None and factors:
        found.append(f"logits x{min(factors):.4g} to x{max(factors):.4g} by head")
    elif factors and abs(factors[0] - 1) > _SCALED:
        found.append(f"logits x{factors[0]:.4g}")
    if row["query_norm"] or row["key_norm"]:
        found.append(f"qk-norm {row['key_norm'] or row['query_norm']}")
    if row["value_norm"]:
        found.append(f"v-norm {row['value_norm']}")
    if row["softcap"]:
        found.append(f"soft-cap {row['softcap']:g}")
    if row["sinks"]:
        found.append("sinks")
    if row["alibi"]:
        found.append("ALiBi")
    return ", ".join(found)


_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def plan_rows(
    plans: Sequence[LatentPlan],
    costs: Sequence[LayerCost],
    step: DecodeStep,
    cache_type: str = "float32",
    source_type: str = "float32",
) -> dict[str, Any]:
    """A plan as data; bytes are of ``source_type`` before and ``cache_type`` after, those of ``costs`` of its own."""
    import dataclasses

    from mla_compile.plan import cache_elements

    before = _ITEMSIZES[source_type] * cache_elements(plans)[0]
    after = sum(_bytes_after(p, cache_type) for p in plans)
    decode = {**dataclasses.asdict(step), "layers": [dataclasses.asdict(c) for c in costs]}
    return {
        "layers": [{**dataclasses.asdict(p), "elements_after": p.elements_after} for p in plans],
        "bytes_per_token_before": before,
        "bytes_per_token_after": after,
        "cache_ratio": after / before,
        "decode_step": decode if costs else None,
    }


def _bytes_after(plan: LatentPlan, cache_type: str) -> int:
    from mla_compile.runtime.onnx_quantised import quantised_bytes

    if cache_type == "int8":
        return quantised_bytes([plan.elements_after], [plan.norm_scales])
    return _ITEMSIZES[cache_type] * plan.elements_after


def show_plan(
    plans: Sequence[LatentPlan],
    costs: Sequence[LayerCost],
    step: DecodeStep,
    cached: str | None = "float32",
    source_type: str = "float32",
) -> None:
    """One row per layer and the sum; ``cached`` is the cache's type, ``source_type`` the original's.

    It is None for an encoder, whose keys and values are not cached, and in which nothing is a step.
    """
    from mla_compile.cost import slower_layers

    columns = ["#", "layer", "rope dims", "rank", "exact rank"]
    columns += ["bytes/token before" if cached else "key and value bytes", "after"]
    rows: list[list[object]] = [
        [
            p.site,
            p.path,
            f"{p.rope_groups} x {p.rope_dims}",
            p.kv_rank,
            p.exact_rank,
            _ITEMSIZES[source_type] * p.elements_before,
            _bytes_after(p, cached or "float32"),
        ]
        for p in plans
    ]
    total = plan_rows(plans, costs, step, cached or "float32", source_type)
    before, after = total["bytes_per_token_before"], total["bytes_per_token_after"]
    rows.append(["", "all", "", "", "", before, f"{after} ({total['cache_ratio']:.2%})"])
    title = f"Plan ({cached} cache)" if cached else "Plan (no cache)"
    if costs:
        title += f"; a step: {step.context} tokens, batch {step.batch}, {step.machine.name}, estimated"
        columns += ["MFLOP/step before", "after", "speed"]
        for row, cost in zip(rows, costs, strict=False):
            row += [f"{part.attention_operations / 1e6:,.1f}" for part in (cost.before, cost.after)]
            row.append(f"x{cost.speedup:.2f}")
        rows[-1] += ["", "", ""]
    print_table(title, columns, rows)
    if slower := slower_layers(costs, step):
        warn(slower)


def conversion_row(cost: ConversionCost | None, alike: tuple[int, int] | None) -> dict[str, Any]:
    """What a conversion takes, and how it is known, as data."""
    import dataclasses

    layers = None if alike is None else {"layers": alike[0], "exported": alike[1]}
    return {"conversion": None if cost is None else dataclasses.asdict(cost), "alike": layers}


def show_conversion(cost: ConversionCost | None, alike: tuple[int, int] | None, step: DecodeStep | None = None) -> None:
    """What a plan is of, in a line each beside the table: on standard error.

    Args:
        cost: What converting takes, where that is known.
        alike: How many layers there are, and how many were exported, where these are fewer.
        step: The step whose speed the table has, if it has one.
    """
    if step is not None:
        tell(f"speed is estimated: a step after {step.context} tokens, batch {step.batch}, {step.machine.name}")
    if alike is not None:
        first = "the first shows" if alike[1] == 1 else f"the first {alike[1]} show"
        tell(f"{alike[0]} layers, of which {first} all kinds; no more was exported")
    if cost is not None:
        read, wrote, held = (_amount(n) for n in (cost.weight_bytes, cost.written_bytes, cost.memory_bytes))
        tell(
            f"converting it takes {_duration(cost.seconds)} besides verification ({_amount(cost.operations)}FLOP in "
            f"float64, one core), reads {read}B, writes {wrote}B and holds {held}B (estimated)"
        )
        tell(f"by fisher, {_by_text(cost.fisher)}")
        tell(f"by transmla, {_by_text(cost.transmla)}")
        written = cost.sampling
        tell(
            f"writing the text first, with --calibration sampled, takes {_duration(written.seconds)} more where memory "
            f"is for many windows at a time ({written.tokens:,} tokens, {_amount(written.operations)}FLOP of running "
            f"the model), and {_amount(written.memory_bytes)}B of it besides caches, as all of it runs (estimated)"
        )
        trained = cost.polish
        tell(
            f"polishing by {trained.steps} steps takes {_duration(trained.seconds)} more "
            f"({_amount(trained.operations)}FLOP of running models) and {_amount(trained.memory_bytes)}B of memory, as "
            "all layers are trained at once (estimated)"
        )


_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60))


def _by_text(cost: TextCost) -> str:
    """What a method takes that needs text, in a line."""
    model, exact, held, less, off, beside = (
        _amount(n)
        for n in (
            cost.text_operations,
            cost.operations,
            cost.memory_bytes,
            cost.offload_memory_bytes,
            cost.offload_bytes,
            cost.disk_bytes,
        )
    )
    return (
        f"on {cost.tokens:,} tokens, {_duration(cost.seconds)} ({model}FLOP of running the model, {exact}FLOP in "
        f"float64), {held}B of memory, or {less}B with {off}B of --offload, and {beside}B of files beside the "
        "output (estimated, without checks)"
    )


def _duration(seconds: float) -> str:
    """A time of a conversion, in the largest unit of which there are two."""
    if seconds < 90:
        return "less than a minute" if seconds < 60 else "about a minute"
    unit, size = next((unit, size) for unit, size in _UNITS if seconds >= 2 * size or size == 60)
    return f"about {seconds / size:,.0f} {unit}"


def _amount(number: float) -> str:
    """A number with the prefix of its unit."""
    for prefix, size in (("T", 1e12), ("G", 1e9)):
        if number >= size:
            return f"{number / size:,.1f} {prefix}"
    return f"{number / 1e6:,.1f} M"
