"""One layer's decoding step in ONNX Runtime on the CPU: latent attention against the best forms of the original.

Usage: python benchmarks/decode_cpu.py [--quick] [--projections] [--minutes N] [--json OUT] [--markdown OUT]
[--plot OUT]

A step appends the new token's row and attends to all rows, for every sequence of a batch. Queries, keys, values and
rows are given: projections, which are smaller in a converted layer, and the rotation of the original's keys are left
out, so the original has the advantage. With ``--projections`` steps are measured a second time with a product of a
hidden state in front, to queries, keys and values, or to queries and the row. The up-projections are part of the latent
step either way.

All forms of a case are measured in turns, in CPU time of one process (in time, with several threads); a figure is the
median over rounds, and a ratio the median of the rounds' own ratios. Caches are as many as fill ``--memory`` and take
turns, as those of a model's layers do: what one step leaves in the processor's cache is of no use to the next.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mla_compile.passes.original_attention import MICROSOFT, OriginalForm, original_function
from mla_compile.runtime.cpu.library import library
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_quantised import LATENT_LEVELS, ROPE_LEVELS, SCALES
from mla_compile.runtime.onnx_up_codes import KEY_AXIS, VALUE_AXIS, codes_and_scales
from mla_compile.runtime.onnx_variant import DOMAIN, FUSED_DOMAIN, LATENT, VERSION, Variant

OPSET = 24
HIDDEN = "hidden"
SPARE = 64
"""Rows of a static cache behind those that are used."""
Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of its latent cache."""

    heads: int
    kv_heads: int
    head_dim: int
    rank: int
    rope_groups: int
    rope_dim: int

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self.heads * self.head_dim

    @property
    def row(self) -> int:
        """Numbers a latent cache keeps per token."""
        return self.rank + self.rope_groups * self.rope_dim

    @property
    def kept(self) -> float:
        """Cache after over before."""
        return self.row / (2 * self.kv_heads * self.head_dim)


SHAPES = {
    "7B-like, 512+64": Shape(32, 32, 128, 512, 1, 64),
    "1B-like, 128+32": Shape(32, 8, 64, 128, 1, 32),
    "1B-like, 256+8x16": Shape(32, 8, 64, 256, 8, 16),
    "7B-like, default, 2496+64": Shape(32, 32, 128, 2496, 1, 64),
    "8B-like, default, 576+64": Shape(32, 8, 128, 576, 1, 64),
}
"""Rank + rope keys x their channels; those of the default size keep 31.25 % of the cache."""
IN_PLACE = ", in place"
ORIGINALS = tuple(f"{form}{IN_PLACE}" for form in OriginalForm if form != OriginalForm.GROUPED_INT8)
LATENTS = ("latent, growing", "latent, static", "latent, nothing written")
QUANTISED_ORIGINAL, QUANTISED_LATENT = f"{OriginalForm.GROUPED_INT8}{IN_PLACE}", "latent, int8, static"
FUSED = ", fused"
"""Behind the name of a form, where the fused kernel computes attention."""
FUSED_LATENT, FUSED_QUANTISED_LATENT = f"latent, static{FUSED}", f"{QUANTISED_LATENT}{FUSED}"
CODED = ", int8 up-projections"
"""Behind the name of a form, whose up-projections are bytes, as ``mla-compile quantize`` makes them."""
CODED_LATENT = f"{FUSED_QUANTISED_LATENT}{CODED}"
FORMS = (
    *ORIGINALS,
    QUANTISED_ORIGINAL,
    *LATENTS,
    FUSED_LATENT,
    QUANTISED_LATENT,
    FUSED_QUANTISED_LATENT,
    CODED_LATENT,
)
KEY_SCALE = 4 / 127
"""Of the quantised original's keys and values, which are normal numbers."""


@dataclass(frozen=True)
class Case:
    """A shape of :data:`SHAPES`, sequences, tokens of each, and whether projections are part of the step."""

    shape: str
    batch: int
    context: int
    projected: bool


@dataclass(frozen=True)
class Row:
    """One form in one case.

    Attributes:
        shape: Key of :data:`SHAPES`.
        batch: Sequences.
        context: Tokens of each, the new one among them.
        projected: Whether queries, keys and values (or rows) are projected in the step.
        form: What was run.
        milliseconds: Median CPU time of a step.
        speedup: Time of the fastest float32 original over this one's: median of the rounds' ratios.
        low: What a quarter of them is below.
        high: What a quarter of them is above.
        int8_speedup: Time of the int8 original over this one's: likewise.
        cache_bytes: What one sequence's cache of so many tokens takes, spare rows and all.
        rounds: Turns.
    """

    shape: str
    batch: int
    context: int
    projected: bool
    form: str
    milliseconds: float
    speedup: float
    low: float
    high: float
    int8_speedup: float
    cache_bytes: int
    rounds: int


def latent_model(
    shape: Shape,
    static: bool,
    written: bool = True,
    quantised: bool = False,
    projected: bool = False,
    fused: bool = False,
    coded: bool = False,
) -> onnx.ModelProto:
    """The node as the compiler writes it; ``written`` False leaves out that the cache is.

    With ``projected`` its query and row are projected from a hidden state; with ``coded`` up-projections are int8, as
    ``mla-compile quantize`` writes them.
    """
    variant = Variant(static=static, quantised=quantised, coded_up=coded)
    function = attention_function(LATENT, OPSET, variant, fused=fused)
    if not written:
        (scatter,) = (node for node in function.node if node.op_type == "TensorScatter")
        kept = helper.make_node("Identity", scatter.input[:1], scatter.output)
        function = _copy(function)
        place = next(i for i, node in enumerate(function.node) if node.op_type == "TensorScatter")
        function.node[place].CopyFrom(kept)
    random = np.random.default_rng(0)
    nope = shape.head_dim - shape.rope_dim
    sizes = {"key_up": (shape.kv_heads, nope, shape.rank), "value_up": (shape.kv_heads, shape.rank, shape.head_dim)}
    ups = {n: (random.standard_normal(size) / size[-1] ** 0.5).astype(np.float32) for n, size in sizes.items()}
    names = ["query", "row", "past", "attention_mask", "cos", "sin", *ups]
    names += ["past_scale"] if quantised else []
    if coded:
        axes = zip(sizes, (KEY_AXIS, VALUE_AXIS), strict=True)
        ups = {n: part for key, axis in axes for n, part in _coded(key, ups[key], axis).items()}
        names += [f"{key}_scale" for key in sizes]
    weights = [numpy_helper.from_array(array, name) for name, array in ups.items()]
    attributes = {
        "num_heads": shape.heads,
        "rope_groups": shape.rope_groups,
        "rope_dim": shape.rope_dim,
        "latent_rank": shape.rank,
        "scale": shape.head_dim**-0.5,
        **({"static": 1} if static else {}),
        **({"quantised": 1} if quantised else {}),
        **({"coded_up": 1} if coded else {}),
    }
    results = ["output", "present", *(["present_scale"] if quantised else [])]
    node = helper.make_node(function.name, names, results, domain=DOMAIN, **attributes)
    rotation = ["B", 1, shape.rope_groups, shape.rope_dim // 2]
    inputs = {
        "query": ["B", 1, shape.heads, shape.head_dim],
        "row": ["B", 1, shape.row],
        "past": ["B", "P", shape.row],
        "attention_mask": ["B", "T"],
        "cos": rotation,
        "sin": rotation,
        **({"past_scale": ["B", "P", SCALES]} if quantised else {}),
    }
    outputs = {"output": ["B", 1, shape.heads, shape.head_dim], "present": ["B", "Q", shape.row]}
    outputs |= {"present_scale": ["B", "Q", SCALES]} if quantised else {}
    types = {"attention_mask": TensorProto.INT64}
    types |= dict.fromkeys(("past", "present"), TensorProto.UINT8) if quantised else {}
    nodes = [node]
    if projected:
        before, projection = _projected(shape, {"query": shape.heads * shape.head_dim, "row": shape.row})
        nodes, weights = [*before, node], [*weights, projection]
        inputs = {HIDDEN: ["B", 1, shape.width], **{n: s for n, s in inputs.items() if n not in ("query", "row")}}
    graph = helper.make_graph(
        nodes,
        "step",
        [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()],
        [
            helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), s)
            for n, s in outputs.items()
            if written or n != "present"
        ],
        weights,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    imports += [helper.make_opsetid(FUSED_DOMAIN, 1)] if fused else []
    return helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)


def _coded(name: str, up: NDArray[np.float32], axis: int) -> Arrays:
    """An up-projection's codes, under its own name, and their scales."""
    codes, scales = codes_and_scales(up, axis)
    return {name: codes, f"{name}_scale": scales}


def _projected(shape: Shape, parts: Mapping[str, int]) -> tuple[list[onnx.NodeProto], onnx.TensorProto]:
    """Nodes from a hidden state to its parts, the first of which has heads, and the weight of the product."""
    first, *others = parts
    heads = helper.make_node("Constant", [], ["heads_shape"], value_ints=[0, 0, shape.heads, shape.head_dim])
    sizes = helper.make_node("Constant", [], ["part_sizes"], value_ints=list(parts.values()))
    nodes = [
        heads,
        sizes,
        helper.make_node("MatMul", [HIDDEN, "projection"], ["all_parts"]),
        helper.make_node("Split", ["all_parts", "part_sizes"], [f"{first}_flat", *others], axis=-1),
        helper.make_node("Reshape", [f"{first}_flat", "heads_shape"], [first]),
    ]
    return nodes, _projection(shape.width, sum(parts.values()))


@functools.lru_cache(maxsize=2)
def _projection(width: int, outputs: int) -> onnx.TensorProto:
    weight = np.random.default_rng(2).standard_normal((width, outputs), np.float32)
    return numpy_helper.from_array(weight / np.float32(width**0.5), "projection")


def _copy(function: onnx.FunctionProto) -> onnx.FunctionProto:
    copied = onnx.FunctionProto()
    copied.CopyFrom(function)
    return copied


def original_model(shape: Shape, form: str, projected: bool = False) -> onnx.ModelProto:
    """Grouped-query attention with a cache that is written in place, in the form that ``mla-compile bench`` has too.

    With ``projected`` its queries, keys and values are projected from a hidden state.
    """
    original = OriginalForm(form.removesuffix(IN_PLACE))
    function = original_function(original, Variant())
    attributes = {"num_heads": shape.heads, "kv_heads": shape.kv_heads, "scale": shape.head_dim**-0.5}
    if form == QUANTISED_ORIGINAL:
        attributes |= {"key_scale": KEY_SCALE, "value_scale": KEY_SCALE}
    cached = TensorProto.INT8 if form == QUANTISED_ORIGINAL else TensorProto.FLOAT
    cache = ["B", shape.kv_heads, "P", shape.head_dim]
    query = ["B", 1, shape.heads, shape.head_dim]
    inputs = {
        "query": (TensorProto.FLOAT, query),
        "key_value": (TensorProto.FLOAT, ["B", 1, 2 * shape.kv_heads * shape.head_dim]),
        "past_key": (cached, cache),
        "past_value": (cached, cache),
        "attention_mask": (TensorProto.INT64, ["B", "T"]),
    }
    outputs = {"output": (TensorProto.FLOAT, query), "present_key": (cached, cache), "present_value": (cached, cache)}
    node = helper.make_node(function.name, list(inputs), list(outputs), domain=DOMAIN, **attributes)
    nodes, weights = [node], []
    if projected:
        sizes = {"query": shape.heads * shape.head_dim, "key_value": 2 * shape.kv_heads * shape.head_dim}
        before, projection = _projected(shape, sizes)
        nodes, weights = [*before, node], [projection]
        inputs = {
            HIDDEN: (TensorProto.FLOAT, ["B", 1, shape.width]),
            **{n: v for n, v in inputs.items() if n not in sizes},
        }
    graph = helper.make_graph(
        nodes,
        "step",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
        weights,
    )
    domains = (("", OPSET), (MICROSOFT, 1), (DOMAIN, VERSION))
    imports = [helper.make_opsetid(*domain) for domain in domains]
    return helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)


class Step:
    """A form that is ready to run: inputs bound, and caches that take turns.

    Args:
        model: One step.
        inputs: All inputs but the caches.
        caches: Names of cache inputs and outputs, with what they hold before the step.
        in_place: Whether input and output are one memory.
        copies: How many caches take turns.
        threads: Threads per operator.

    Attributes:
        cache_bytes: Of one cache, before the step.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        inputs: Arrays,
        caches: Mapping[tuple[str, str], NDArray[np.generic]],
        in_place: bool,
        copies: int,
        threads: int,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Forms are run in turns, each with threads of its own: one form's must not still be waiting, which they do
        # busily, while the next is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.register_custom_ops_library(str(library()))
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._outputs = {o.name for o in self._session.get_outputs()}
        taken = {i.name for i in self._session.get_inputs()}
        self._inputs = {name: value for name, value in inputs.items() if name in taken}
        self.cache_bytes = sum(held.nbytes for held in caches.values())
        self._bindings = [self._bind(caches, in_place) for _ in range(copies)]
        self._turn = 0
        for _ in self._bindings:
            self()  # memory is touched, and what a growing cache becomes is allocated

    def _bind(self, caches: Mapping[tuple[str, str], NDArray[np.generic]], in_place: bool) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name, value in self._inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("output")
        for (past, present), held in caches.items():
            memory = onnxruntime.OrtValue.ortvalue_from_numpy(held.copy())
            binding.bind_ortvalue_input(past, memory)
            if present in self._outputs:
                _ = binding.bind_ortvalue_output(present, memory) if in_place else binding.bind_output(present)
        return binding

    def __call__(self) -> NDArray[np.float32]:
        """Run once, with the next cache."""
        binding = self._bindings[self._turn]
        self._turn = (self._turn + 1) % len(self._bindings)
        self._session.run_with_iobinding(binding)
        output: NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return output


def make_steps(
    shape: Shape, batch: int, context: int, memory: float, threads: int, projected: bool
) -> dict[str, Callable[[], Step]]:
    """All forms of one case, each made when it is called for."""
    random = np.random.default_rng(1)

    def numbers(*size: int) -> NDArray[np.float32]:
        return random.standard_normal(size).astype(np.float32)

    past, room = context - 1, context + SPARE
    inputs: Arrays = {
        HIDDEN: numbers(batch, 1, shape.width),
        "query": numbers(batch, 1, shape.heads, shape.head_dim),
        "row": numbers(batch, 1, shape.row),
        "cos": numbers(batch, 1, shape.rope_groups, shape.rope_dim // 2),
        "sin": numbers(batch, 1, shape.rope_groups, shape.rope_dim // 2),
        "attention_mask": np.ones((batch, context), np.int64),
    }
    # Every form's cache stands for the same numbers, which codes can express.
    widths, middles = (shape.rank, shape.row - shape.rank), (LATENT_LEVELS + 1, ROPE_LEVELS + 1)
    codes = random.integers(1, 2 * np.repeat(middles, widths), (batch, past, shape.row), np.uint8)
    scales = random.uniform(1, 2, (batch, past, SCALES)).astype(np.float32) / np.float32(middles)
    rows = (codes - np.repeat(np.float32(middles), widths)) * np.repeat(scales, widths, 2)

    def latent(form: str) -> Step:
        form, fused = form.removesuffix(FUSED), form.endswith(FUSED)
        static = form != "latent, growing"
        cache = np.zeros((batch, room if static else past, shape.row), np.float32)
        cache[:, :past] = rows
        model = latent_model(shape, static, form != "latent, nothing written", projected=projected, fused=fused)
        copies = max(1, int(memory // cache.nbytes))
        return Step(model, inputs, {("past", "present"): cache}, static, copies, threads)

    def quantised_latent(form: str) -> Step:
        held = {("past", "present"): codes, ("past_scale", "present_scale"): scales}
        caches = {names: np.zeros((batch, room, part.shape[2]), part.dtype) for names, part in held.items()}
        for names, part in held.items():
            caches[names][:, :past] = part
        copies = max(1, int(memory // sum(cache.nbytes for cache in caches.values())))
        fused = form.removesuffix(CODED).endswith(FUSED)
        model = latent_model(shape, True, quantised=True, projected=projected, fused=fused, coded=form.endswith(CODED))
        return Step(model, inputs, caches, True, copies, threads)

    plain: Arrays = {
        HIDDEN: inputs[HIDDEN],
        "query": inputs["query"],
        "key_value": numbers(batch, 1, 2 * shape.kv_heads * shape.head_dim),
        "attention_mask": inputs["attention_mask"],
    }
    size = (batch, shape.kv_heads, room, shape.head_dim)
    steps = {n: np.clip(np.round(numbers(*size) / KEY_SCALE), -127, 127).astype(np.int8) for n in ("key", "value")}

    def original(form: str) -> Step:
        held = {name: n if form == QUANTISED_ORIGINAL else n * np.float32(KEY_SCALE) for name, n in steps.items()}
        caches = {(f"past_{name}", f"present_{name}"): value for name, value in held.items()}
        copies = max(1, int(memory // sum(value.nbytes for value in held.values())))
        return Step(original_model(shape, form, projected), plain, caches, True, copies, threads)

    plain_forms = {form: functools.partial(original, form) for form in (*ORIGINALS, QUANTISED_ORIGINAL)}
    latents = {form: functools.partial(latent, form) for form in (*LATENTS, FUSED_LATENT)}
    codes_forms = (QUANTISED_LATENT, FUSED_QUANTISED_LATENT, CODED_LATENT)
    return plain_forms | latents | {form: functools.partial(quantised_latent, form) for form in codes_forms}


def measure(case: Case, rounds: int, memory: float, threads: int, seconds: float) -> list[Row]:
    """Check that forms agree, then run them in turns, of which there are as many as the seconds allow, but three."""
    begun, name, batch, context = time.monotonic(), case.shape, case.batch, case.context
    made = {
        form: make() for form, make in make_steps(SHAPES[name], batch, context, memory, threads, case.projected).items()
    }
    # Quantised forms round the new token too, by a hundredth of its largest number.
    exact = (*LATENTS[:2], FUSED_LATENT)
    for group, rounded in (
        (ORIGINALS, QUANTISED_ORIGINAL),
        (exact, QUANTISED_LATENT),
        (exact, FUSED_QUANTISED_LATENT),
        (exact, CODED_LATENT),
    ):
        first, *others, last = (made[form]().reshape(batch, -1) for form in (*group, rounded))
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-3, atol=1e-4)
        assert np.abs(last - first).max() <= 0.05 * np.abs(first).max(), rounded
    times: dict[str, list[float]] = {form: [] for form in made}
    clock = time.process_time if threads == 1 else time.perf_counter
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() - begun > seconds:
            break
        for form, step in made.items():
            begin = clock()
            step()
            times[form].append(clock() - begin)
    medians = {form: statistics.median(found) for form, found in times.items()}
    best = min(ORIGINALS, key=medians.__getitem__)
    return [
        Row(
            name,
            batch,
            context,
            case.projected,
            form,
            1e3 * medians[form],
            statistics.median(b / t for b, t in zip(times[best], found, strict=True)),
            *(float(q) for q in np.quantile(np.divide(times[best], found), (0.25, 0.75))),
            statistics.median(b / t for b, t in zip(times[QUANTISED_ORIGINAL], found, strict=True)),
            made[form].cache_bytes // batch,
            len(found),
        )
        for form, found in times.items()
    ]


def markdown(rows: list[Row], machine: str) -> str:
    """One table per shape."""
    lines = [
        "# One layer's decoding step on the CPU",
        "",
        f"{machine}. Milliseconds, and in brackets how many times as fast as the fastest float32 original of the same "
        "column, with the quartiles of all turns; for int8 forms also how many times as fast as the int8 original. "
        "Written by `benchmarks/decode_cpu.py`, which says what is measured.",
    ]
    for name, projected in dict.fromkeys((row.shape, row.projected) for row in rows):
        own = [r for r in rows if (r.shape, r.projected) == (name, projected)]
        cases = sorted({(r.batch, r.context) for r in own})
        with_what = "with the projections of queries, keys and values" if projected else "attention alone"
        lines += ["", f"## {name}: {SHAPES[name].kept:.1%} of the cache, {with_what}", ""]
        lines += [
            "| | " + " | ".join(f"batch {b}, {c} tokens" for b, c in cases) + " |",
            "|---" * (1 + len(cases)) + "|",
        ]
        for form in FORMS:
            found = {(r.batch, r.context): r for r in own if r.form == form}
            lines.append("| " + " | ".join([form, *(_cell(found[case]) for case in cases)]) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    ratio = f"{row.milliseconds:.2f} ({row.speedup:.2f}, {row.low:.2f}-{row.high:.2f})"
    return f"{ratio}, int8: {row.int8_speedup:.2f}" if "int8" in row.form else ratio


DRAWN = {
    f"{OriginalForm.GROUPED}{IN_PLACE}": ("GroupQueryAttention", "#8a8a8a", "--"),
    QUANTISED_ORIGINAL: ("GroupQueryAttention, int8", "#8a8a8a", ":"),
    "latent, static": ("latent, standard operators", "#2a78d6", "--"),
    FUSED_LATENT: ("latent, fused kernel", "#2a78d6", "-"),
    FUSED_QUANTISED_LATENT: ("latent, fused kernel, int8", "#d6652a", "-"),
}
"""Label, colour and line of the forms that are drawn: those that are best in their kind."""


def plot(rows: list[Row], path: Path) -> None:
    """Draw how many times as fast as the fastest float32 original forms are: a panel per shape, batch and extent."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    shapes = list(dict.fromkeys(row.shape for row in rows))
    lines = sorted({(row.projected, row.batch) for row in rows})
    figure = Figure(figsize=(4.2 * len(shapes), 3 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), len(shapes), squeeze=False)
    for line, (projected, batch) in zip(panels, lines, strict=True):
        for axes, shape in zip(line, shapes, strict=True):
            own = [r for r in rows if (r.shape, r.projected, r.batch) == (shape, projected, batch)]
            for form, (label, color, style) in DRAWN.items():
                found = sorted((r for r in own if r.form == form), key=lambda r: r.context)
                contexts, speedups = [r.context for r in found], [r.speedup for r in found]
                axes.plot(contexts, speedups, marker="o", ms=4, ls=style, color=color, label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row.context for row in rows}))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_ylim(bottom=0)
            what = "with projections" if projected else "attention alone"
            axes.set_title(f"{shape}, batch {batch}, {what}", fontsize="medium")
            axes.grid(visible=True, alpha=0.3)
        line[0].set_ylabel("times the fastest original")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(DRAWN), fontsize="small", frameon=False)
    for axes in panels[-1]:
        axes.set_xlabel("tokens in the cache")
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)


def conditions(threads: int) -> str:
    """What figures are of: machine, threads, clock and runtime."""
    clock = "CPU time" if threads == 1 else "time"
    return f"{platform.machine()}, {threads} thread(s), {clock}, ONNX Runtime {onnxruntime.__version__}"


def main() -> None:
    """Measure every case and write what was asked for."""
    parser = argparse.ArgumentParser(description="One layer's decoding step in ONNX Runtime on the CPU.")
    parser.add_argument("--quick", action="store_true", help="512 and 4096 tokens, few rounds")
    parser.add_argument("--projections", action="store_true", help="measure steps with their projections too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="a .svg or .png file")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of shapes' names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=256, help="MB of caches per form that take turns")
    parser.add_argument("--largest", type=float, default=2, help="GB of an original's cache; larger cases are left out")
    parser.add_argument("--minutes", type=float, help="time for all of it: fewer turns, if need be, but three")
    arguments = parser.parse_args()
    contexts, rounds = ((512, 4096), 15) if arguments.quick else ((512, 4096, 16384), 40)
    cases = [
        Case(name, batch, context, projected)
        for name, shape in SHAPES.items()
        for projected in ((False, True) if arguments.projections else (False,))
        for batch in (1, 8)
        for context in contexts
        if any(part in name for part in arguments.only)
        and batch * context * 2 * shape.kv_heads * shape.head_dim * 4 <= 1e9 * arguments.largest
    ]
    end = time.monotonic() + 60 * (arguments.minutes or 1e6)
    rows: list[Row] = []
    for place, case in enumerate(cases):
        seconds = (end - time.monotonic()) / (len(cases) - place)
        rows += measure(case, rounds, 1e6 * arguments.memory, arguments.threads, seconds)
        for row in rows[-len(FORMS) :]:
            print(
                f"{case.shape:18} x{case.batch} {case.context:6} {'proj' if case.projected else '':4} {row.form:36} "
                f"{row.milliseconds:8.2f} {row.speedup:6.2f} ({row.low:.2f}-{row.high:.2f}) {row.int8_speedup:6.2f}",
                flush=True,
            )
    machine = f"{conditions(arguments.threads)}, up to {rounds} turns"
    if arguments.json:
        data = {"machine": machine, "memory_mb": arguments.memory, "rows": [asdict(r) for r in rows]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, machine))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
