"""Convert models of real size: time, memory and files per number of layers, and what factorising a layer costs.

    python benchmarks/scale.py --layers 1 --layers 2 --layers 4 --json scale.json

Checkpoints of the shapes of Llama 2 7B and Llama 3 8B with random bfloat16 weights are written in shards, converted to
ONNX by mha2mla without text and with a little (random tokens), loaded by ONNX Runtime, and removed. Every conversion
runs in a process of its own, in which the memory is looked at ten times a second: resident memory, and the part of it
that is anonymous, which cannot be dropped as pages of mapped files can. 32 layers take about 70 GB of disk.

``--factorisation`` measures ways to factorise one layer instead, in times of one ``eigh`` of the same run, with one
thread.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mla_compile.progress import StageTiming

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
SHARD = 2_000_000_000
WINDOWS, LENGTH, NEW_TOKENS = 8, 128, 4
_GIB = 2**30


def write_checkpoint(shape: Mapping[str, Any], layers: int, folder: Path) -> int:
    """Write a checkpoint of random weights shard by shard; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    config = LlamaConfig(**shape, num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator, places, total = torch.Generator().manual_seed(0), {}, 0
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, size in shapes.items():
        random = torch.randn(size, generator=generator) * 0.02 if len(size) > 1 else torch.ones(size)
        shard[name] = random.bfloat16()
        total += shard[name].nbytes
        if sum(v.nbytes for v in shard.values()) > SHARD:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Memory:
    """Looks at this process's memory ten times a second; also a display, so that every stage has peaks of its own."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self.peak = {"VmRSS": 0.0, "RssAnon": 0.0}
        self._stage = dict(self.peak)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            text = Path("/proc/self/status").read_text()
            for name in self.peak:
                value = int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1024 / _GIB  # type: ignore[index]
                self.peak[name] = max(self.peak[name], value)
                self._stage[name] = max(self._stage[name], value)
            time.sleep(0.1)

    def started(self, name: str, total: int | None) -> None:
        """A stage begins."""
        self._stage.update(dict.fromkeys(self._stage, 0.0))

    def advanced(self, note: str) -> None:
        """A step is done."""

    def told(self, line: str) -> None:
        """Something is said."""

    def finished(self, timing: StageTiming) -> None:
        """A stage is done."""
        found = {"stage": timing.name, "seconds": round(timing.seconds, 2)}
        self.stages.append(found | {name: round(value, 3) for name, value in self._stage.items()})
        print(json.dumps(self.stages[-1]), file=sys.stderr, flush=True)


def convert(source: Path, out: Path, calibrated: bool, verified: bool) -> dict[str, Any]:
    """Convert in this process."""
    memory = Memory()
    begin = time.perf_counter()
    from mla_compile import api
    from mla_compile.layer_store import store_beside

    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    text = torch.randint(0, vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with store_beside(out) as store:
        compiled = api.compile(
            source,
            calibration=text if calibrated else None,
            method="mha2mla",
            gradients=False,
            statistics_cache=False,
            check=verified,
            out=out,
            store=store,
            display=memory,
        )
        assert isinstance(compiled, api.CompiledModel)
        compiled.to_onnx(out, display=memory)
    return {"seconds": time.perf_counter() - begin, "peak_gib": memory.peak, "stages": memory.stages}


def decode(path: Path) -> dict[str, Any]:
    """Load a file in ONNX Runtime and add tokens to a prompt, in this process."""
    memory = Memory()
    begin = time.perf_counter()
    from mla_compile.runtime.onnx_session import OnnxDecoder

    decoder = OnnxDecoder(path)
    loaded = time.perf_counter() - begin
    tokens = decoder.generate([[1, 2, 3]], NEW_TOKENS)[0]
    seconds = time.perf_counter() - begin - loaded
    return {"load_seconds": loaded, "seconds": seconds, "tokens": len(tokens), "peak_gib": memory.peak}


def in_a_process(task: str, *words: object) -> dict[str, Any]:
    """Run a function of this file in a process of its own; what it failed with stands for its result."""
    done = subprocess.run(
        [sys.executable, __file__, "--task", task, *map(str, words)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        return {"failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, layers: int, folder: Path, verified: bool) -> list[dict[str, Any]]:
    """Both conversions of one model."""
    source, rows = folder / "source", []
    size = write_checkpoint(SHAPES[name], layers, source)
    for calibrated in (False, True):
        out = folder / "out" / "model.onnx"
        row: dict[str, Any] = {"model": name, "layers": layers, "calibrated": calibrated, "weight_bytes": size}
        row["convert"] = in_a_process("convert", source, out, int(calibrated), int(verified))
        if out.is_file():
            row["output_bytes"] = sum(p.stat().st_size for p in out.parent.iterdir())
            row["decode"] = in_a_process("decode", out)
        print(json.dumps({k: v for k, v in row.items() if k != "convert"} | {"peak": row["convert"].get("peak_gib")}))
        rows.append(row)
        shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(source)
    return rows


def factorisation(rows: int, width: int, rank: int) -> dict[str, Any]:
    """Ways to the best factors of a matrix of bfloat16 numbers whose singular values fall by 10 000, by one thread."""
    from mla_compile.passes.factorise import truncated_svd

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    matrix = random(rows, width) * torch.logspace(0, -4, width, dtype=torch.float64)
    matrix = (matrix @ torch.linalg.qr(random(width, width))[0]).bfloat16().double()

    def svd() -> tuple[Tensor, Tensor]:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank]

    def randomised() -> tuple[Tensor, Tensor]:
        """Halko, Martinsson and Tropp 2011, with two power iterations and a tenth more directions."""
        basis = torch.linalg.qr(matrix.mT @ random(rows, rank + rank // 10))[0]
        for _ in range(2):
            basis = torch.linalg.qr(matrix.mT @ (matrix @ basis))[0]
        inner = matrix @ basis
        down = (basis @ torch.linalg.eigh(inner.mT @ inner)[1].flip(1)[:, :rank]).mT
        return matrix @ down.mT, down

    def single() -> tuple[Tensor, Tensor]:
        up, down = truncated_svd(matrix.float(), rank)
        return up.double(), down.double()

    square = random(min(rows, width), min(rows, width))
    unit = _seconds(lambda: torch.linalg.eigh(square + square.mT))[1]
    found: dict[str, Any] = {"rows": rows, "width": width, "rank": rank, "eigh_seconds": unit, "ways": {}}
    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "ours": lambda: truncated_svd(matrix, rank),
        "ours, float32": single,
        "randomised": randomised,
        "full svd": svd,
    }
    for way, run in ways.items():
        (up, down), seconds = _seconds(run)
        error = float(torch.linalg.norm(matrix - up @ down) / torch.linalg.norm(matrix))
        found["ways"][way] = {"of_eigh": seconds / unit, "error": error}
        print(way, found["ways"][way], flush=True)
    return found


def _seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    """Processor time, which other processes do not add to."""
    begin = time.process_time()
    return run(), time.process_time() - begin


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, action="append", help="layers of the models; several times for several")
    parser.add_argument("--models", choices=[*SHAPES], nargs="+", default=[*SHAPES])
    parser.add_argument("--no-verify", action="store_true", help="skip the checks against the original")
    parser.add_argument("--folder", type=Path, help="where checkpoints and files are written, and removed")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--factorisation", action="store_true", help="measure ways to factorise a layer instead")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        kind, *words = given.task
        if kind == "convert":
            result = convert(Path(words[0]), Path(words[1]), words[2] == "1", words[3] == "1")
        else:
            result = decode(Path(words[0]))
        print(json.dumps(result))
        return
    figures: list[dict[str, Any]] = []
    if given.factorisation:
        figures = [factorisation(7680, 4096, 2048), factorisation(1920, 4096, 512)]
    else:
        for name in given.models:
            for layers in given.layers or [1, 2, 4]:
                with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                    figures += measure(name, layers, Path(folder), not given.no_verify)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
