"""One layer's decoding step in ONNX Runtime on the CPU: latent attention against the best forms of the original.

Usage: python benchmarks/decode_cpu.py [--quick] [--json OUT] [--markdown OUT]

A step appends the new token's row and attends to all rows, for every sequence of a batch. Queries, keys, values and
rows are given: projections, which are smaller in a converted layer, and the rotation of the original's keys are left
out, so the original has the advantage. All forms of a case are measured in turns, in CPU time of one process; a figure
is the median over rounds, and a ratio the median of the rounds' own ratios. Caches are as many as fill ``--memory`` and
take turns, as those of a model's layers do: what one step leaves in the processor's cache is of no use to the next.
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
from onnx import TensorProto, helper, numpy_helper, parser

from mla_compile.runtime.onnx_function import DOMAIN, LATENT, VERSION, Variant, attention_function
from mla_compile.runtime.onnx_quantised import LATENT_LEVELS, ROPE_LEVELS, SCALES

OPSET = 24
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
}
"""Rank + rope keys x their channels."""
ORIGINALS = ("GroupQueryAttention, in place", "MatMul, in place", "Attention, in place")
LATENTS = ("latent, growing", "latent, static", "latent, nothing written")
QUANTISED_ORIGINAL, QUANTISED_LATENT = "GroupQueryAttention, int8, in place", "latent, int8, static"
FORMS = (*ORIGINALS, QUANTISED_ORIGINAL, *LATENTS, QUANTISED_LATENT)
KEY_SCALE = 4 / 127
"""Of the quantised original's keys and values, which are normal numbers."""


@dataclass(frozen=True)
class Row:
    """One form in one case.

    Attributes:
        shape: Key of :data:`SHAPES`.
        batch: Sequences.
        context: Tokens of each, the new one among them.
        form: What was run.
        milliseconds: Median CPU time of a step.
        speedup: Time of the fastest float32 original over this one's: median of the rounds' ratios.
    """

    shape: str
    batch: int
    context: int
    form: str
    milliseconds: float
    speedup: float


def latent_model(shape: Shape, static: bool, written: bool = True, quantised: bool = False) -> onnx.ModelProto:
    """The node as the compiler writes it; ``written`` False leaves out that the cache is."""
    function = attention_function(LATENT, OPSET, Variant(static=static, quantised=quantised))
    if not written:
        (scatter,) = (node for node in function.node if node.op_type == "TensorScatter")
        kept = helper.make_node("Identity", scatter.input[:1], scatter.output)
        function = _copy(function)
        place = next(i for i, node in enumerate(function.node) if node.op_type == "TensorScatter")
        function.node[place].CopyFrom(kept)
    random = np.random.default_rng(0)
    nope = shape.head_dim - shape.rope_dim
    sizes = {"key_up": (shape.kv_heads, nope, shape.rank), "value_up": (shape.kv_heads, shape.rank, shape.head_dim)}
    weights = [
        numpy_helper.from_array((random.standard_normal(size) / size[-1] ** 0.5).astype(np.float32), name)
        for name, size in sizes.items()
    ]
    names = ["query", "row", "past", "attention_mask", "cos", "sin", "key_up", "value_up"]
    names += ["past_scale"] if quantised else []
    attributes = {
        "num_heads": shape.heads,
        "rope_groups": shape.rope_groups,
        "rope_dim": shape.rope_dim,
        "latent_rank": shape.rank,
        "scale": shape.head_dim**-0.5,
        **({"static": 1} if static else {}),
        **({"quantised": 1} if quantised else {}),
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
    graph = helper.make_graph(
        [node],
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
    return helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)


def _copy(function: onnx.FunctionProto) -> onnx.FunctionProto:
    copied = onnx.FunctionProto()
    copied.CopyFrom(function)
    return copied


_ORIGINAL_TEXTS = {
    "GroupQueryAttention, in place": """
    (float[B, 1, {q}] query, float[B, 1, {kv}] key, float[B, 1, {kv}] value, float[B, {n}, T, {d}] past_key,
     float[B, {n}, T, {d}] past_value, int32[B] seqlens_k, int32[] total)
    => (float[B, 1, {q}] output, float[B, {n}, T, {d}] present_key, float[B, {n}, T, {d}] present_value) {{
      output, present_key, present_value = com.microsoft.GroupQueryAttention <num_heads = {h}, kv_num_heads = {n}>
        (query, key, value, past_key, past_value, seqlens_k, total)
    }}""",
    "GroupQueryAttention, int8, in place": """
    (float[B, 1, {q}] query, float[B, 1, {kv}] key, float[B, 1, {kv}] value, int8[B, {n}, T, {d}] past_key,
     int8[B, {n}, T, {d}] past_value, int32[B] seqlens_k, int32[] total, float[1] key_scale)
    => (float[B, 1, {q}] output, int8[B, {n}, T, {d}] present_key, int8[B, {n}, T, {d}] present_value) {{
      output, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads = {h}, kv_num_heads = {n}, kv_cache_bit_width = 8, k_quant_type = "PER_TENSOR",
         v_quant_type = "PER_TENSOR">
        (query, key, value, past_key, past_value, seqlens_k, total, , , , , , key_scale, key_scale)
    }}""",
    "MatMul, in place": """
    (float[B, 1, {q}] query, float[B, 1, {kv}] key, float[B, 1, {kv}] value, float[B, {n}, T, {d}] past_key,
     float[B, {n}, T, {d}] past_value, int64[B] index, bool[B, 1, {g}, T] seen)
    => (float[B, 1, {q}] output, float[B, {n}, T, {d}] present_key, float[B, {n}, T, {d}] present_value) {{
      grouped = Constant <value_ints = [0, {n}, {g}, {d}]> ()
      one_each = Constant <value_ints = [0, {n}, 1, {d}]> ()
      flat = Constant <value_ints = [0, 1, {q}]> ()
      factor = Constant <value_float = {scale}> ()
      hidden = Constant <value_float = -inf> ()
      key_own = Reshape (key, one_each)
      value_own = Reshape (value, one_each)
      present_key = TensorScatter (past_key, key_own, index)
      present_value = TensorScatter (past_value, value_own, index)
      rows = Reshape (query, grouped)
      scaled = Mul (rows, factor)
      turned = Transpose <perm = [0, 1, 3, 2]> (scaled)
      columns = MatMul (present_key, turned)
      scores = Transpose <perm = [0, 1, 3, 2]> (columns)
      masked = Where (seen, scores, hidden)
      weights = Softmax (masked)
      context = MatMul (weights, present_value)
      output = Reshape (context, flat)
    }}""",
    "Attention, in place": """
    (float[B, 1, {q}] query, float[B, 1, {kv}] key, float[B, 1, {kv}] value, float[B, {n}, T, {d}] past_key,
     float[B, {n}, T, {d}] past_value, int64[B] index, bool[B, 1, {g}, T] seen)
    => (float[B, 1, {q}] output, float[B, {n}, T, {d}] present_key, float[B, {n}, T, {d}] present_value) {{
      grouped = Constant <value_ints = [0, {n}, {g}, {d}]> ()
      one_each = Constant <value_ints = [0, {n}, 1, {d}]> ()
      flat = Constant <value_ints = [0, 1, {q}]> ()
      key_own = Reshape (key, one_each)
      value_own = Reshape (value, one_each)
      present_key = TensorScatter (past_key, key_own, index)
      present_value = TensorScatter (past_value, value_own, index)
      rows = Reshape (query, grouped)
      context = Attention <scale = {scale}> (rows, present_key, present_value, seen)
      output = Reshape (context, flat)
    }}""",
}


def original_model(shape: Shape, form: str) -> onnx.ModelProto:
    """Grouped-query attention with a cache that is written in place; heads that share a key are rows of one product."""
    text = _ORIGINAL_TEXTS[form].format(
        q=shape.heads * shape.head_dim,
        kv=shape.kv_heads * shape.head_dim,
        n=shape.kv_heads,
        g=shape.heads // shape.kv_heads,
        h=shape.heads,
        d=shape.head_dim,
        scale=shape.head_dim**-0.5,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(parser.parse_graph(f"step {text}"), opset_imports=imports, ir_version=10)


class Step:
    """A form that is ready to run: inputs bound, and caches that take turns.

    Args:
        model: One step.
        inputs: All inputs but the caches.
        caches: Names of cache inputs and outputs, with what they hold before the step.
        in_place: Whether input and output are one memory.
        copies: How many caches take turns.
        threads: Threads per operator.
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
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._outputs = {o.name for o in self._session.get_outputs()}
        taken = {i.name for i in self._session.get_inputs()}
        self._inputs = {name: value for name, value in inputs.items() if name in taken}
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


def make_steps(shape: Shape, batch: int, context: int, memory: float, threads: int) -> dict[str, Callable[[], Step]]:
    """All forms of one case, each made when it is called for."""
    random = np.random.default_rng(1)

    def numbers(*size: int) -> NDArray[np.float32]:
        return random.standard_normal(size).astype(np.float32)

    past, room = context - 1, context + SPARE
    inputs: Arrays = {
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
        static = form != "latent, growing"
        cache = np.zeros((batch, room if static else past, shape.row), np.float32)
        cache[:, :past] = rows
        model = latent_model(shape, static, form != "latent, nothing written")
        copies = max(1, int(memory // cache.nbytes))
        return Step(model, inputs, {("past", "present"): cache}, static, copies, threads)

    def quantised_latent() -> Step:
        held = {("past", "present"): codes, ("past_scale", "present_scale"): scales}
        caches = {names: np.zeros((batch, room, part.shape[2]), part.dtype) for names, part in held.items()}
        for names, part in held.items():
            caches[names][:, :past] = part
        copies = max(1, int(memory // sum(cache.nbytes for cache in caches.values())))
        return Step(latent_model(shape, True, quantised=True), inputs, caches, True, copies, threads)

    flat = (batch, 1, shape.kv_heads * shape.head_dim)
    plain: Arrays = {
        "query": inputs["query"].reshape(batch, 1, -1),
        "key": numbers(*flat),
        "value": numbers(*flat),
        "seqlens_k": np.full(batch, past, np.int32),
        "total": np.array(context, np.int32),
        "index": np.full(batch, past, np.int64),
        "seen": np.broadcast_to(np.arange(room) < context, (batch, 1, shape.heads // shape.kv_heads, room)).copy(),
    }
    plain["key_scale"] = np.full(1, KEY_SCALE, np.float32)
    size = (batch, shape.kv_heads, room, shape.head_dim)
    steps = {n: np.clip(np.round(numbers(*size) / KEY_SCALE), -127, 127).astype(np.int8) for n in ("key", "value")}

    def original(form: str) -> Step:
        held = {name: n if form == QUANTISED_ORIGINAL else n * np.float32(KEY_SCALE) for name, n in steps.items()}
        caches = {(f"past_{name}", f"present_{name}"): value for name, value in held.items()}
        copies = max(1, int(memory // sum(value.nbytes for value in held.values())))
        return Step(original_model(shape, form), plain, caches, True, copies, threads)

    plain_forms = {form: functools.partial(original, form) for form in (*ORIGINALS, QUANTISED_ORIGINAL)}
    latents = {form: functools.partial(latent, form) for form in LATENTS} | {QUANTISED_LATENT: quantised_latent}
    return plain_forms | latents


def measure(name: str, batch: int, context: int, rounds: int, memory: float, threads: int) -> list[Row]:
    """Check that forms agree, then run them in turns."""
    made = {form: make() for form, make in make_steps(SHAPES[name], batch, context, memory, threads).items()}
    # Quantised forms round the new token too, by a hundredth of its largest number.
    for group, rounded in ((ORIGINALS, QUANTISED_ORIGINAL), (LATENTS[:2], QUANTISED_LATENT)):
        first, *others, last = (made[form]().reshape(batch, -1) for form in (*group, rounded))
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-3, atol=1e-4)
        assert np.abs(last - first).max() <= 0.05 * np.abs(first).max(), rounded
    times: dict[str, list[float]] = {form: [] for form in made}
    for _ in range(rounds):
        for form, step in made.items():
            begin = time.process_time()
            step()
            times[form].append(time.process_time() - begin)
    medians = {form: statistics.median(found) for form, found in times.items()}
    best = min(ORIGINALS, key=medians.__getitem__)
    return [
        Row(
            name,
            batch,
            context,
            form,
            1e3 * medians[form],
            statistics.median(b / t for b, t in zip(times[best], found, strict=True)),
        )
        for form, found in times.items()
    ]


def markdown(rows: list[Row], machine: str) -> str:
    """One table per shape."""
    lines = [
        "# One layer's decoding step on the CPU",
        "",
        f"{machine}. Milliseconds of CPU time, and in brackets how many times as fast as the fastest float32 original "
        "of the same column. Written by `benchmarks/decode_cpu.py`, which says what is measured.",
    ]
    for name, shape in SHAPES.items():
        cases = sorted({(r.batch, r.context) for r in rows if r.shape == name})
        lines += ["", f"## {name}: {shape.kept:.1%} of the cache", ""]
        lines += [
            "| | " + " | ".join(f"batch {b}, {c} tokens" for b, c in cases) + " |",
            "|---" * (1 + len(cases)) + "|",
        ]
        for form in FORMS:
            found = {(r.batch, r.context): r for r in rows if r.shape == name and r.form == form}
            cells = [f"{found[c].milliseconds:.2f} ({found[c].speedup:.2f})" for c in cases]
            lines.append("| " + " | ".join([form, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every case and write what was asked for."""
    parser = argparse.ArgumentParser(description="One layer's decoding step in ONNX Runtime on the CPU.")
    parser.add_argument("--quick", action="store_true", help="512 and 4096 tokens, few rounds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--only", help="part of a shape's name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=256, help="MB of caches per form that take turns")
    arguments = parser.parse_args()
    contexts, rounds = ((512, 4096), 15) if arguments.quick else ((512, 4096, 16384), 40)
    rows = []
    for name in (n for n in SHAPES if (arguments.only or "") in n):
        for batch in (1, 8):
            for context in contexts:
                rows += measure(name, batch, context, rounds, 1e6 * arguments.memory, arguments.threads)
                for row in rows[-len(FORMS) :]:
                    print(
                        f"{name:18} x{batch} {context:6} {row.form:36} {row.milliseconds:8.2f} {row.speedup:6.2f}",
                        flush=True,
                    )
    machine = f"{platform.machine()}, {arguments.threads} thread(s), ONNX Runtime {onnxruntime.__version__}"
    if arguments.json:
        data = {"machine": machine, "memory_mb": arguments.memory, "rounds": rounds, "rows": [asdict(r) for r in rows]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, machine))


if __name__ == "__main__":
    main()
