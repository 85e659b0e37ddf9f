"""One layer's decoding step with what models have beside plain attention: the fused kernel against standard operators.

Usage: python benchmarks/decode_variants.py [--only PART] [--context N] [--rounds N] [--threads N] [--json OUT]
[--markdown OUT]

Sizes and the way of measuring are those of ``decode_cpu.py``: both forms in turns in one process, caches that take
turns, CPU time with one thread, and a ratio is the median of the rounds' own ratios. Caches are static. Before anything
is measured both forms are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx
from decode_cpu import OPSET, SHAPES, SPARE, Arrays, Shape, Step, conditions
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_halves import half_width
from mla_compile.runtime.onnx_quantised import SCALES
from mla_compile.runtime.onnx_variant import DOMAIN, FUSED_DOMAIN, LATENT, VERSION, Variant

WINDOW = 1024


@dataclass(frozen=True)
class Feature:
    """What a layer has.

    Attributes:
        models: Who has it, for the table.
        variant: Its node.
        numbers: Attributes of the node.
        float16: Whether the model is of float16, else float32.
    """

    models: str
    variant: Variant
    numbers: dict[str, float] = field(default_factory=dict)
    float16: bool = False

    @property
    def dtype(self) -> type[np.floating]:
        """Of its numbers, but for the angles of rotation."""
        return np.float16 if self.float16 else np.float32


def features(shape: Shape) -> dict[str, Feature]:
    """Every feature by itself; norms are of every key or value head."""
    static, heads = {"static": True}, shape.kv_heads
    return {
        "plain": Feature("Llama", Variant(**static)),
        "key scales": Feature("Qwen3", Variant(key_scales=True, **static), {"key_scales": heads}),
        "key scales of rope keys too": Feature(
            "Qwen3", Variant(key_scales=True, scaled_rope=True, **static), {"key_scales": heads, "scaled_rope": 1}
        ),
        "value scales": Feature("Gemma 4", Variant(value_scales=True, **static), {"value_scales": heads}),
        "soft-cap": Feature("Gemma 2", Variant(softcap=True, **static), {"softcap": 50.0}),
        "sinks": Feature("gpt-oss", Variant(sinks=True, **static), {"has_sinks": 1}),
        "slopes": Feature("BLOOM, MPT", Variant(slopes=True, **static), {"has_slopes": 1}),
        f"window of {WINDOW}": Feature("Mistral", Variant(window=True, **static), {"window": WINDOW}),
        "plain, float16": Feature("Llama", Variant(**static), float16=True),
        "key scales, float16": Feature(
            "Qwen3", Variant(key_scales=True, **static), {"key_scales": heads}, float16=True
        ),
        "plain, halves": Feature("Llama in onnxruntime-genai", Variant(halves=True, **static)),
        "key scales, halves": Feature(
            "Qwen3 in onnxruntime-genai", Variant(key_scales=True, halves=True, **static), {"key_scales": heads}
        ),
        "plain, int8": Feature("Llama", Variant(quantised=True, **static)),
        "soft-cap, int8": Feature("Gemma 2", Variant(softcap=True, quantised=True, **static), {"softcap": 50.0}),
        "sinks, int8": Feature("gpt-oss", Variant(sinks=True, quantised=True, **static), {"has_sinks": 1}),
        "slopes, int8": Feature("BLOOM, MPT", Variant(slopes=True, quantised=True, **static), {"has_slopes": 1}),
    }


@dataclass(frozen=True)
class Row:
    """One feature: median milliseconds of both forms, and how many times as fast the fused one is, with quartiles."""

    shape: str
    feature: str
    models: str
    context: int
    standard: float
    fused: float
    speedup: float
    low: float
    high: float
    rounds: int


def model_and_inputs(shape: Shape, feature: Feature, context: int, fused: bool) -> tuple[onnx.ModelProto, Arrays]:
    """The node as the compiler writes it, and all its inputs but the cache."""
    variant, random = feature.variant, np.random.default_rng(0)
    width = shape.row + int(feature.numbers.get("key_scales", 0) + feature.numbers.get("value_scales", 0))
    nope, half = shape.head_dim - shape.rope_dim, shape.rope_dim // 2

    def numbers(*size: int) -> NDArray[np.float32]:
        return random.standard_normal(size).astype(np.float32)

    inputs: Arrays = {
        "query": numbers(1, 1, shape.heads, shape.head_dim).astype(feature.dtype),
        "row": numbers(1, 1, width).astype(feature.dtype),
        "attention_mask": np.ones((1, context), np.int64),
        "cos": numbers(1, 1, shape.rope_groups, half),
        "sin": numbers(1, 1, shape.rope_groups, half),
    }
    weights = {
        "key_up": numbers(shape.kv_heads, nope, shape.rank) / np.float32(shape.rank**0.5),
        "value_up": numbers(shape.kv_heads, shape.rank, shape.head_dim) / np.float32(shape.head_dim**0.5),
    }
    if variant.sinks:
        weights["sinks"] = numbers(shape.heads)
    if variant.slopes:
        weights["slopes"] = 2.0 ** (-8 * np.arange(1, shape.heads + 1, dtype=np.float32) / shape.heads)
    caches = ["past_key", "past_value"] if variant.halves else ["past", *(["past_scale"] if variant.quantised else [])]
    beside = [name for name in caches if name == "past_scale"]
    names = [*list(inputs)[:2], *[n for n in caches if n not in beside], *list(inputs)[2:], *weights, *beside]
    results = ["output", *(name.replace("past", "present") for name in caches)]
    number = TensorProto.FLOAT16 if feature.float16 else TensorProto.FLOAT
    kinds = {"attention_mask": TensorProto.INT64, "cos": TensorProto.FLOAT, "sin": TensorProto.FLOAT}
    kinds |= dict.fromkeys(("past", "present"), TensorProto.UINT8) if variant.quantised else {}
    shapes: dict[str, list[str | int]] = {name: [*value.shape] for name, value in inputs.items()}
    shapes |= {"attention_mask": [1, "T"], "output": [1, 1, shape.heads, shape.head_dim]}
    for name in ("past", "present"):
        shapes |= {name: [1, "P", width], f"{name}_scale": [1, "P", SCALES]}
        shapes |= {f"{name}_{half}": [1, 1, "P", half_width([width])] for half in ("key", "value")}
    function = attention_function(LATENT, OPSET, variant, fused=fused, float16=feature.float16)
    sizes = {"num_heads": shape.heads, "rope_groups": shape.rope_groups, "rope_dim": shape.rope_dim}
    flags = {name: 1 for name in ("static", "quantised", "halves") if getattr(variant, name)}
    node = helper.make_node(
        function.name,
        names,
        results,
        domain=DOMAIN,
        latent_rank=shape.rank,
        scale=shape.head_dim**-0.5,
        **sizes,
        **flags,
        **feature.numbers,
    )
    graph = helper.make_graph(
        [node],
        "step",
        *(
            [helper.make_tensor_value_info(n, kinds.get(n, number), shapes[n]) for n in part]
            for part in ([n for n in names if n not in weights], results)
        ),
        [numpy_helper.from_array(value.astype(feature.dtype), name) for name, value in weights.items()],
    )
    domains = (("", OPSET), (DOMAIN, VERSION), *([(FUSED_DOMAIN, 1)] if fused else []))
    imports = [helper.make_opsetid(*domain) for domain in domains]
    return helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10), inputs


def make_caches(shape: Shape, feature: Feature, context: int) -> dict[tuple[str, str], NDArray[np.generic]]:
    """What the caches hold before the step: random rows, in a ring where there is a window."""
    random = np.random.default_rng(1)
    scales = int(feature.numbers.get("key_scales", 0) + feature.numbers.get("value_scales", 0))
    room = WINDOW - 1 if feature.variant.window else context + SPARE
    if feature.variant.quantised:
        codes = random.integers(1, 128, (1, room, shape.row), np.uint8)
        units = random.uniform(0.01, 0.02, (1, room, SCALES)).astype(np.float32)
        return {("past", "present"): codes, ("past_scale", "present_scale"): units}
    rows = random.standard_normal((1, room, shape.row + scales)).astype(np.float32)
    rows[..., shape.row :] = random.uniform(0.5, 2, rows[..., shape.row :].shape)
    if feature.variant.halves:
        rows = np.pad(rows, ((0, 0), (0, 0), (0, rows.shape[-1] % 2)))
        named = zip(("key", "value"), np.split(rows[:, None], 2, axis=-1), strict=True)
        return {(f"past_{half}", f"present_{half}"): held for half, held in named}
    return {("past", "present"): rows.astype(feature.dtype)}


def measure(name: str, kind: str, context: int, rounds: int, memory: float, threads: int) -> Row:
    """Compare both forms, then run them in turns."""
    shape = SHAPES[name]
    feature = features(shape)[kind]
    caches = make_caches(shape, feature, context)
    copies = max(1, int(memory // sum(held.nbytes for held in caches.values())))
    standard, fused = (
        Step(*model_and_inputs(shape, feature, context, fused), caches, True, copies, threads)
        for fused in (False, True)
    )
    expected, got = standard(), fused()
    # One digit of eight bits instead of two, where rows are codes.
    tolerance = 0.05 if feature.variant.quantised else 5e-3 if feature.float16 else 1e-4
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max(), (name, kind)
    times: dict[Step, list[float]] = {standard: [], fused: []}
    clock = time.process_time if threads == 1 else time.perf_counter
    for _ in range(rounds):
        for step, found in times.items():
            begin = clock()
            step()
            found.append(clock() - begin)
    ratios = np.divide(times[standard], times[fused])
    return Row(
        name,
        kind,
        feature.models,
        context,
        *(1e3 * statistics.median(found) for found in times.values()),
        statistics.median(ratios.tolist()),
        *(float(q) for q in np.quantile(ratios, (0.25, 0.75))),
        rounds,
    )


def markdown(rows: list[Row], machine: str) -> str:
    """A table per shape."""
    lines = [
        "# One layer's decoding step, feature by feature",
        "",
        f"{machine}. Milliseconds of standard operators and of the fused kernel, and how many times as fast that "
        "is, with the quartiles of all turns. Written by `benchmarks/decode_variants.py`, which says what is measured.",
    ]
    for name in dict.fromkeys(row.shape for row in rows):
        own = [row for row in rows if row.shape == name]
        lines += ["", f"## {name}, {own[0].context} tokens", ""]
        lines += ["| feature | such as | standard | fused | times as fast |", "|---|---|---|---|---|"]
        lines += [
            f"| {r.feature} | {r.models} | {r.standard:.2f} | {r.fused:.2f} | "
            f"{r.speedup:.2f} ({r.low:.2f}-{r.high:.2f}) |"
            for r in own
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every feature and write what was asked for."""
    parser = argparse.ArgumentParser(description="One layer's decoding step on the CPU, feature by feature.")
    parser.add_argument("--only", default="", help="part of a shape's name, or of a feature's")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=64, help="MB of caches per form that take turns")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        for kind in features(shape):
            if arguments.only in name or arguments.only in kind:
                row = measure(
                    name, kind, arguments.context, arguments.rounds, 1e6 * arguments.memory, arguments.threads
                )
                rows.append(row)
                print(
                    f"{name:18} {kind:28} {row.standard:8.2f} {row.fused:8.2f} "
                    f"{row.speedup:6.2f} ({row.low:.2f}-{row.high:.2f})",
                    flush=True,
                )
    machine = f"{conditions(arguments.threads)}, {arguments.rounds} turns"
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, machine))


if __name__ == "__main__":
    main()
