"""A decoding step of a whole model with weights of fewer bits, in ONNX Runtime on the CPU.

    python benchmarks/weights.py --json weights.json --markdown weights.md

A random model of Llama 3.2 1B's layers (four of them, and a smaller vocabulary) is converted at the default size,
without text; ``mla-compile quantize`` makes two files of the result. All three run in turns in one process, with
standard operators and with the fused kernel, a static cache, and one token at a time after a prompt of random tokens.
With one thread, times are CPU time. Random weights are as fast as any; what fewer bits cost trained ones is measured by
``mla-compile eval``.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from decode_cpu import conditions

import mla_compile
from mla_compile.artifacts.quantised_file import write_quantised
from mla_compile.evaluation.turns import spread, turns
from mla_compile.passes.quantise_weights import BITS
from mla_compile.progress import Stages
from mla_compile.runtime.onnx_cache import OnnxCache
from mla_compile.runtime.onnx_session import OnnxDecoder

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
PART = 512
"""Tokens of a prompt that run at once."""
KERNELS = ("standard", "fused")
FLOAT32 = "float32"


@dataclass(frozen=True)
class Row:
    """Steps of one file: median milliseconds, and how many times as fast as float32 weights with the same kernel."""

    weights: str
    kernel: str
    megabytes: float
    context: int
    milliseconds: float
    speedup: float


def write_files(folder: Path) -> dict[str, Path]:
    """The converted model, and the same with weights of fewer bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "model")
    files = {FLOAT32: folder / "float32.onnx"}
    made = mla_compile.compile(str(folder / "model"), method="mha2mla", cache="static", check=False)
    made.to_onnx(files[FLOAT32])
    for weights in BITS:
        files[weights] = folder / f"{weights}.onnx"
        write_quantised(files[FLOAT32], files[weights], weights, stages=Stages())
    return files


def fill(decoder: OnnxDecoder, context: int) -> OnnxCache:
    """The cache of a prompt of all tokens but the last."""
    ids = np.random.default_rng(0).integers(0, int(SHAPE["vocab_size"]), (1, context - 1))
    cache = decoder.empty_cache(1, context)
    for first in range(0, context - 1, PART):
        part = ids[:, first : first + PART]
        last = first + part.shape[1]
        _, cache = decoder.step(part, np.ones((1, last), np.int64), np.arange(first, last)[None], cache, 1)
    return cache


def measure(files: dict[str, Path], contexts: list[int], rounds: int, threads: int) -> list[Row]:
    """Steps of all files, with either kernel, in turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    decoders = {
        f"{weights}, {kernel}": OnnxDecoder(path, kernel=kernel, threads=threads, in_turns=True)
        for weights, path in files.items()
        for kernel in KERNELS
    }
    rows = []
    for context in contexts:
        token, mask, place = np.array([[7]]), np.ones((1, context), np.int64), np.array([[context - 1]])
        steps = {
            key: functools.partial(decoder.step, token, mask, place, fill(decoder, context))
            for key, decoder in decoders.items()
        }
        seconds = turns(steps, rounds, clock)
        for weights, path in files.items():
            for kernel in KERNELS:
                times = seconds[f"{weights}, {kernel}"]
                ratio = spread(seconds[f"{FLOAT32}, {kernel}"], times).median
                size, step = path.stat().st_size / 1e6, 1e3 * statistics.median(times)
                rows.append(Row(weights, kernel, size, context, step, ratio))
    return rows


def markdown(rows: list[Row], machine: str) -> str:
    """A table."""
    lines = [
        "# A decoding step with weights of fewer bits",
        "",
        f"{machine}. A random model of four of Llama 3.2 1B's layers and 32,000 tokens, converted at the default size, "
        "with a static cache: milliseconds of a step, and how many times as fast it is as with float32 weights and the "
        "same kernel. Written by `benchmarks/weights.py`.",
        "",
        "| weights | file, MB | tokens | standard operators | fused kernel |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.kernel == KERNELS[0]:
            fused = next(r for r in rows if (r.weights, r.context, r.kernel) == (row.weights, row.context, KERNELS[1]))
            cells = " | ".join(f"{r.milliseconds:.1f} ({r.speedup:.2f})" for r in (row, fused))
            lines.append(f"| {row.weights} | {row.megabytes:.0f} | {row.context} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write what was asked for."""
    parser = argparse.ArgumentParser(description="A decoding step with weights of fewer bits.")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(write_files(Path(folder)), arguments.contexts, arguments.rounds, arguments.threads)
    machine = f"{conditions(arguments.threads)}, {arguments.rounds} turns"
    print(markdown(rows, machine))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, machine))


if __name__ == "__main__":
    main()
