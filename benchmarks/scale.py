"""Convert models of real size: time, memory and files per number of layers, and what factorising a layer costs.

    python benchmarks/scale.py --layers 1 --layers 2 --layers 4 --json scale.json --markdown scale.md

Checkpoints of the shapes of Llama 2 7B and Llama 3 8B with random bfloat16 weights are written in shards, converted to
ONNX by mha2mla without text and with a little (1024 random tokens), compared layer by layer with PyTorch, run once more
from the files alone to add four tokens to a prompt, and removed. Every conversion and every such run is in a process of
its own, in which the memory is looked at ten times a second: resident memory, and the part of it that is anonymous,
which cannot be dropped as pages of mapped files can. ``--method fisher`` takes a text of 8192 random tokens, which is
more than inputs are wide (of fewer, eigenvalue problems are smaller), and gradients.

ONNX Runtime's CPU provider has no kernels for bfloat16, and holds the weights of a file twice. Files are therefore run
in pieces, in float32, with the weights of one layer or so in memory (mla_compile/passes/onnx_pieces.py); a file in
float32 for which there is memory is run as it is.

A row goes to ``--json`` when it is there, and rows that are there are not measured again: after a stop the same command
goes on. Where ``--folder`` is given and all was killed, it goes on inside a row: the checkpoint and finished layers are
there still, and so are the time and the memory of the conversion until then, to which those of the rest are added. 32
layers take about 40 GB of disk, which are asked for before anything is written.

``--factorisation`` measures ways to factorise one layer instead, in times of one ``eigh`` of the same run, with one
thread.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mla_compile.passes.onnx_pieces import PiecewiseSession
from mla_compile.passes.retype_onnx import is_narrow_file
from mla_compile.progress import Stages, StageTiming
from mla_compile.runtime.generate import generate
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_cache import GrowingCache
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.text.evaluate import relative_error
from mla_compile.verification.agreement import in_float32

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
TEXTS: Mapping[str, int] = {"mha2mla": 1024, "fisher": 8192}
"""Tokens of text, if there is one."""
LENGTH, NEW_TOKENS = 128, 4
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
_GIB = 2**30
_ITEMSIZE = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
_BESIDE = 0.25
"""Finished layers, which lie beside the output while it is written, as a share of it."""


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

    def __init__(self, record: Path | None = None) -> None:
        self.stages: list[dict[str, Any]] = []
        self.peak = {"VmRSS": 0.0, "RssAnon": 0.0}
        self._stage, self._name = dict(self.peak), ""
        self._record, self._begin, self._stage_begin = record, time.perf_counter(), time.perf_counter()
        self._before: dict[str, Any] = {"seconds": 0.0, "processor_seconds": 0.0, "stages": [], "starts": 0}
        if record is not None and record.is_file():
            stopped = json.loads(record.read_text())
            self.peak, self._before = stopped["peak_gib"], stopped
            self.stages = stopped["stages"]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            text = Path("/proc/self/status").read_text()
            for name in self.peak:
                value = int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1024 / _GIB  # type: ignore[index]
                self.peak[name] = max(self.peak[name], value)
                self._stage[name] = max(self._stage[name], value)
            time.sleep(0.1)

    def spent(self) -> dict[str, Any]:
        """Time and memory until now, with those of processes that were killed."""
        return {
            "seconds": self._before["seconds"] + time.perf_counter() - self._begin,
            "processor_seconds": self._before["processor_seconds"] + time.process_time(),
            "peak_gib": dict(self.peak),
            "starts": self._before["starts"] + 1,
            "stages": self.stages[:],
        }

    def started(self, name: str, total: int | None) -> None:
        """A stage begins."""
        self._name, self._stage_begin = name, time.perf_counter()
        self._stage.update(dict.fromkeys(self._stage, 0.0))

    def advanced(self, note: str) -> None:
        """A step is done: from here the conversion can go on, if it is killed."""
        if self._record is not None:
            spent = self.spent()
            spent["stages"].append(self._found(self._name, time.perf_counter() - self._stage_begin))
            self._record.parent.mkdir(parents=True, exist_ok=True)
            write(self._record, json.dumps(spent))

    def _found(self, name: str, seconds: float) -> dict[str, Any]:
        return {"stage": name, "seconds": round(seconds, 2)} | {k: round(v, 3) for k, v in self._stage.items()}

    def told(self, line: str) -> None:
        """Something is said."""

    def finished(self, timing: StageTiming) -> None:
        """A stage is done."""
        self.stages.append(self._found(timing.name, timing.seconds))
        print(json.dumps(self.stages[-1]), file=sys.stderr, flush=True)


Settings = Mapping[str, Any]
"""What a row is of: model, layers, calibrated, verified, dtype, method, jobs."""


def convert(source: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Convert in this process, and compare the file with the module it was made of."""
    memory = Memory(out.parent / ".spent.json")
    from mla_compile import api
    from mla_compile.disk.layer_store import store_beside

    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    windows = TEXTS[settings["method"]] // LENGTH
    text = torch.randint(0, vocabulary, (windows, LENGTH), generator=torch.Generator().manual_seed(1))
    with store_beside(out) as store:
        compiled = api.compile(
            source,
            method=settings["method"],
            dtype=settings["dtype"],
            jobs=settings["jobs"],
            statistics_cache=False,
            check=settings["verified"],
            out=out,
            store=store,
            display=memory,
            **({"calibration": text, "gradients": settings["method"] == "fisher"} if settings["calibrated"] else {}),
        )
        assert isinstance(compiled, api.CompiledModel)
        report = compiled.to_onnx(out, display=memory)
        found: dict[str, Any] = {**memory.spent(), "threads": torch.get_num_threads()}
        if report.verification is not None:
            found["verification"] = dataclasses.asdict(report.verification)
        with Stages(memory).stage("layer by layer"):
            found["layer_by_layer"] = layer_by_layer(compiled.module, out)
    return found | {"layer_by_layer": found["layer_by_layer"] | memory.stages[-1]}


def layer_by_layer(module: LatentModel, path: Path) -> dict[str, Any]:
    """What every layer adds to the cache, and the logits: ONNX Runtime and PyTorch, both in float32, on a prompt.

    Returns:
        Largest difference as a share of the largest number, of every layer's cache and of the logits, and the tokens
        that the module adds.
    """
    wide, decoder = in_float32(module), OnnxDecoder(path, session=PiecewiseSession(path, wide=True))
    ids = np.array([PROMPT])
    ones = np.ones_like(ids)
    logits, cache = decoder.step(ids, ones, ones.cumsum(1) - 1, decoder.empty_cache(1))
    assert isinstance(cache, GrowingCache)
    with torch.inference_mode():
        expected = wide(torch.from_numpy(ids))
    errors = [
        relative_error(torch.from_numpy(value.numpy()), theirs)
        for value, theirs in zip(cache.values, expected.cache, strict=True)
    ]
    tokens = generate(TorchDecoder(wide), [PROMPT], NEW_TOKENS)[0]
    return {"layers": errors, "logits": relative_error(torch.from_numpy(logits), expected.logits), "tokens": tokens}


def decode(path: Path) -> dict[str, Any]:
    """Add tokens to a prompt with a file alone, in this process."""
    memory = Memory()
    begin = time.perf_counter()
    narrow = is_narrow_file(path)
    size = sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))
    session = PiecewiseSession(path, wide=narrow) if narrow or 3 * size > available() else None
    decoder = OnnxDecoder(path, session=session)
    loaded = time.perf_counter() - begin
    tokens = decoder.generate([PROMPT], NEW_TOKENS)[0]
    found = {"load_seconds": loaded, "seconds": time.perf_counter() - begin - loaded, "tokens": tokens}
    return found | {"pieces": 1 if session is None else session.pieces, "peak_gib": memory.peak}


def available() -> int:
    """Bytes of memory that can be had."""
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]


def in_a_process(task: str, *words: object) -> dict[str, Any]:
    """Run a function of this file in a process of its own; what it failed with stands for its result."""
    done = subprocess.run(
        [sys.executable, __file__, "--task", task, *map(str, words)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        return {"failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(wanted: Sequence[Settings], parent: Path | None, add: Callable[[dict[str, Any]], None]) -> None:
    """Conversions of one model; ``add`` is told of each."""
    model, layers = wanted[0]["model"], wanted[0]["layers"]
    with place(parent, f"scale-{model}-{layers}") as folder:
        source, whole = folder / "source", folder / "source.json"
        if not whole.is_file():
            require_room(folder, wanted)
            shutil.rmtree(source, ignore_errors=True)
            write(whole, json.dumps(write_checkpoint(SHAPES[model], layers, source)))
        size = json.loads(whole.read_text())
        for settings in wanted:
            kind = "-".join(str(settings[key]) for key in ("calibrated", "verified", "dtype", "method", "jobs"))
            out = folder / kind / "model.onnx"
            made = in_a_process("convert", source, out, json.dumps(settings))
            row = {**settings, "weight_bytes": size, "convert": made}
            if out.is_file():
                row["output_bytes"] = sum(p.stat().st_size for p in out.parent.glob(f"{out.name}*"))
                row["decode"] = in_a_process("decode", out)
            shutil.rmtree(out.parent, ignore_errors=True)
            add(row)


@contextlib.contextmanager
def place(parent: Path | None, name: str) -> Iterator[Path]:
    """A folder that is removed in the end, but not by a kill; one that a killed run left is gone on with."""
    if parent is None:
        with tempfile.TemporaryDirectory(prefix="scale-") as made:
            yield Path(made)
        return
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_room(folder: Path, wanted: Sequence[Settings]) -> None:
    """End with a sentence where a checkpoint, the largest file made of it and its layers do not fit."""
    shape = SHAPES[wanted[0]["model"]]
    width, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    layer = width * (2 * width + 2 * width * shape["num_key_value_heads"] // heads + 3 * inner)
    numbers = wanted[0]["layers"] * layer + 2 * shape["vocab_size"] * width
    made = max(_ITEMSIZE[settings["dtype"]] for settings in wanted)
    needed = int(numbers * (2 + made * (1 + _BESIDE))) + _GIB
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{wanted[0]['layers']} layers of {wanted[0]['model']} take {needed / 1e9:.0f} GB of disk, and there are "
            f"{free / 1e9:.0f} GB in '{folder.parent}'. Choose another place with --folder, or fewer --layers."
        )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    heads = (
        "model | layers (at a time) | method | text | checks | seconds (of the processor) | seconds per layer | "
        "factorising, elapsed | peak resident, GiB | peak anonymous, GiB | weights, GB | file, GB | "
        "largest difference of a layer | of the logits | 4 tokens"
    )
    lines = [
        "# Converting models of real size",
        "",
        "Written by `benchmarks/scale.py`, which says what is measured. Of times, those of the processor count, in",
        "brackets: where others are far above them, the machine did other work meanwhile.",
        "",
    ]
    lines += [f"| {heads} |", "|" + "---|" * (heads.count("|") + 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    name = row["model"] if row["dtype"] == "auto" else f"{row['model']}, {row['dtype']}"
    text = f"{TEXTS[row['method']]:,} tokens" if row["calibrated"] else "none"
    checks = "on" if row["verified"] else "off"
    first = [name, f"{row['layers']} ({row['jobs']})", row["method"], text, checks]
    made, decoded = row["convert"], row.get("decode", {})
    if "failed" in made:
        return [*first, f"failed ({made['failed']})", *["–"] * 9]
    factorising = sum(stage["seconds"] for stage in made["stages"] if stage["stage"] == "factorise")
    seconds = [made["seconds"] / row["layers"], factorising / row["layers"]]
    compared = made["layer_by_layer"]
    if "failed" in decoded:
        tokens = f"failed ({decoded['failed']})"
    else:
        same = "as PyTorch" if decoded["tokens"] == compared["tokens"] else "**not** as PyTorch"
        pieces = "" if decoded["pieces"] == 1 else f", {decoded['pieces']} pieces"
        tokens = f"{same}, {decoded['seconds']:.0f} s, {decoded['peak_gib']['RssAnon']:.1f} GiB anonymous{pieces}"
    return [
        *first,
        f"{made['seconds']:.0f} ({made['processor_seconds']:.0f})",
        *(f"{value:.0f}" for value in seconds),
        *(f"{made['peak_gib'][kind]:.1f}" for kind in ("VmRSS", "RssAnon")),
        *(f"{row[kind] / 1e9:.2f}" for kind in ("weight_bytes", "output_bytes")),
        *(f"{value:.0e}" for value in (max(compared["layers"]), compared["logits"])),
        tokens,
    ]


def factorisation(rows: int, width: int, rank: int) -> dict[str, Any]:
    """Ways to the best factors of a matrix of bfloat16 numbers whose singular values fall by 10 000, by one thread."""
    from mla_compile.passes.low_rank import truncated_svd

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

    def ours(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        made = truncated_svd(matrix.to(dtype), rank)
        return made.up.double(), made.down.double()

    square = random(min(rows, width), min(rows, width))
    unit = _seconds(lambda: torch.linalg.eigh(square + square.mT))[1]
    found: dict[str, Any] = {"rows": rows, "width": width, "rank": rank, "eigh_seconds": unit, "ways": {}}
    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "ours": lambda: ours(torch.float64),
        "ours, float32": lambda: ours(torch.float32),
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
    parser.add_argument("--method", choices=["mha2mla", "fisher"], default="mha2mla", help="of the conversion")
    parser.add_argument("--jobs", type=int, default=1, help="layers that are factorised at a time")
    parser.add_argument("--calibrated", choices=["no", "yes", "both"], default="both", help="convert with a text")
    parser.add_argument("--no-verify", action="store_true", help="skip the compiler's own checks")
    parser.add_argument("--dtype", choices=[*_ITEMSIZE], default="auto", help="of the result")
    parser.add_argument("--folder", type=Path, help="where checkpoints and files are written, and removed")
    parser.add_argument("--json", type=Path, help="file for the figures; rows that it has are not measured again")
    parser.add_argument("--markdown", type=Path, help="file for the figures as a table")
    parser.add_argument("--factorisation", action="store_true", help="measure ways to factorise a layer instead")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        kind, *words = given.task
        if kind == "convert":
            result = convert(Path(words[0]), Path(words[1]), json.loads(words[2]))
        else:
            result = decode(Path(words[0]))
        print(json.dumps(result))
        return
    if given.factorisation:
        figures = [factorisation(7680, 4096, 2048), factorisation(1920, 1024, 512)]
        if given.json:
            write(given.json, json.dumps(figures, indent=2))
        return
    rows = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.is_file() else []
    rows = [{"method": "mha2mla", "jobs": 1, **row} for row in rows if "failed" not in row["convert"]]

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(markdown([row]).splitlines()[-1], flush=True)
        if given.json:
            write(given.json, json.dumps(rows, indent=2))

    if given.method == "fisher" and given.calibrated != "yes":
        parser.error("--method fisher needs a text: add --calibrated yes")
    texts = {"no": [False], "yes": [True], "both": [False, True]}[given.calibrated]
    for name in given.models:
        for layers in given.layers or [1, 2, 4]:
            settings = {"model": name, "layers": layers, "verified": not given.no_verify}
            settings |= {"dtype": given.dtype, "method": given.method, "jobs": given.jobs}
            wanted = [{**settings, "calibrated": calibrated} for calibrated in texts]
            missing = [one for one in wanted if not any(one.items() <= row.items() for row in rows)]
            if missing:
                measure(missing, given.folder, add)
    if given.markdown:
        write(given.markdown, markdown(rows))


def write(path: Path, text: str) -> None:
    """Write beside, then rename: a stop leaves the figures that were there."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text.rstrip() + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main()
