"""``mla-compile bench``: a converted model beside its original in the original's fastest forms, in ONNX Runtime.

All files run in one process with equally many threads, in turns; a ratio is one of two times of the same turn, so that
whatever else the machine does falls on both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mla_compile.artifacts.companions import stored_report
from mla_compile.artifacts.fuse import is_fused
from mla_compile.errors import LoadError, MlaCompileError, RefusedError, UsageError
from mla_compile.evaluation.benchmark import USUAL, Benchmark, File, Prefill, Step, Workload, slower
from mla_compile.evaluation.turns import spread, turns
from mla_compile.passes.lower_original import original_to_onnx, write_original
from mla_compile.passes.original_attention import OriginalForm
from mla_compile.passes.plain_caches import with_plain_caches
from mla_compile.passes.retype import type_name
from mla_compile.program import Program
from mla_compile.progress import Display, Stages
from mla_compile.runtime.onnx_cache import StaticCache
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.onnx_timing import filled, last_token, random_ids
from mla_compile.sources import frontend
from mla_compile.sources.exported import language_model
from mla_compile.sources.given import require_named
from mla_compile.text.evaluate import original_scorer, relative_error
from mla_compile.verification.agreement import require_equal

__all__ = ["bench"]

_OF_REPORT = "original"
"""Stands for the model that a file was made of, as the report beside it says."""
_CHECKED = 24
"""Random tokens that an original's file is compared on."""
_AS_FLOAT32 = "Give one in float32: convert has --dtype float32."
_FUSED = ", fused kernel"
"""Behind a file's name, where it runs with it."""
_PATIENCE = 30.0
"""Seconds that all prompts of one length may take to be run three times more than once."""


def bench(
    files: Sequence[str | Path],
    against: str = _OF_REPORT,
    workload: Workload = USUAL,
    *,
    display: Display | None = None,
) -> Benchmark:
    """Measure converted files beside their original, which is lowered to ONNX for that, on the CPU.

    Args:
        files: ONNX files made by this compiler.
        against: The original: what the report beside the first file names (``original``), or any model.
        workload: What to measure.
        display: Shows progress.

    Raises:
        LoadError: A file or the original cannot be read.
        RefusedError: A layer of the original is not understood.
        UsageError: Models do not fit each other or the workload.
        VerificationError: A file of the original does not compute what the original does.
    """
    stages = Stages(display)
    if against != _OF_REPORT:
        require_named(against)
    named = {_unused(Path(f).stem, i, files): Path(f) for i, f in enumerate(files)}
    decoders = {name: _open(path, workload.threads) for name, path in named.items()}
    with stages.stage("load"):
        made_of = next(iter(decoders.values())).metadata.get("source")
        name, program = _load_original(Path(files[0]), made_of, against)
    _require_same(decoders, program, name)
    longest = [program.max_positions, *(d.metadata.get("max_position_embeddings") for d in decoders.values())]
    contexts = workload.within(min((n for n in longest if n), default=None))
    with stages.stage("compile the fused kernel"):
        fused = {f"{name}{_FUSED}": _open(path, workload.threads, kernel="auto") for name, path in named.items()}
    fused = {name: decoder for name, decoder in fused.items() if decoder.fused}
    paths = named | {name: named[name.removesuffix(_FUSED)] for name in fused}
    int8 = any(d.metadata["config"].get("cache_type") == "int8" for d in decoders.values())
    with tempfile.TemporaryDirectory(prefix="mla-compile-bench-") as folder:
        with stages.stage("lower originals"):
            originals, notes = _write_originals(program, Path(folder), int8, workload.threads)
        paths = {**originals, **paths}
        everything = {form: _open(path, workload.threads) for form, path in originals.items()}
        everything |= decoders | fused
        with stages.stage("load each alone", len(paths)) as stage:
            found = tuple(
                _alone(form, form in originals, path, everything[form], max(contexts), workload)
                for form, path in stage.each(paths.items())
            )
        prefills, steps = [], []
        total = len(contexts) * len(workload.batches)
        with stages.stage("measure", total) as stage:
            for context in contexts:
                caches, prompts = _prompts(everything, tuple(originals), context, workload.threads)
                prefills += prompts
                for batch in workload.batches:
                    steps += _steps(everything, tuple(originals), caches, context, batch, workload)
                    stage()
    clock = "CPU time" if workload.threads == 1 else "time"
    notes += slower(steps, originals)
    return Benchmark(name, found, tuple(prefills), tuple(steps), workload.threads, clock, notes)


def _open(path: Path, threads: int, kernel: str = "standard") -> OnnxDecoder:
    """Open a file to be timed in turns with others, whose threads must not wait busily meanwhile."""
    if path.suffix != ".onnx":
        raise UsageError(f"'{path}' is not named like an ONNX file.", "Give a .onnx file made by mla-compile.")
    if kernel == "standard" and path.is_file() and is_fused(path):
        raise UsageError(
            f"'{path}' was written by mla-compile fuse, and originals are measured beside files of standard operators.",
            "Give the file that it was made from; the fused kernel is measured with that too.",
        )
    return OnnxDecoder(path, threads=threads, kernel=kernel, in_turns=True)


def _unused(stem: str, place: int, files: Sequence[str | Path]) -> str:
    """What a file is called: by its name, or by its path where another has the same name."""
    stems = [Path(f).stem for f in files]
    return stem if stems.count(stem) == 1 else str(files[place])


def _load_original(file: Path, made_of: str | None, against: str) -> tuple[str, Program]:
    """Load what a file is compared with.

    Args:
        file: The file.
        made_of: Name of the model that it says it was made of.
        against: A model's name, or ``original`` for what the report beside the file names.

    Raises:
        LoadError: There is no such report, or it is of another model, or what is named cannot be read.
    """
    if against != _OF_REPORT:
        return against, _float32(against)
    report = stored_report(file)
    try:
        source = str(json.loads(report.read_text("utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"There is no report of a conversion beside '{file}' that names its original.",
            "Name the original: --against MODEL.",
        ) from error
    if made_of not in (None, Path(source).name):
        raise LoadError(
            f"The report beside '{file}' is of '{Path(source).name}' converted, and the file of '{made_of}'.",
            "Name the original: --against MODEL.",
        )
    try:
        return source, _float32(source)
    except LoadError as error:
        raise LoadError(
            f"'{report}' names '{source}' as the original, which cannot be read from here: {error.message}",
            "Name the original: --against MODEL.",
        ) from error


def _float32(name: str) -> Program:
    """Load a model in float32.

    Raises:
        UsageError: It is an archive of another type.
    """
    program = language_model(frontend.load_any(name, dtype=torch.float32))
    if program.dtype != torch.float32:
        kind = type_name(program.dtype)
        raise UsageError(f"'{name}' is an archive in {kind}, and originals are measured in float32.", _AS_FLOAT32)
    return program


def _require_same(decoders: Mapping[str, OnnxDecoder], program: Program, name: str) -> None:
    for file, decoder in decoders.items():
        kind = decoder.metadata["config"].get("dtype", "float32")
        if kind in ("float16", "bfloat16"):
            raise UsageError(f"'{file}' is {kind}, and files are measured in float32 or with int8 caches.", _AS_FLOAT32)
        if decoder.vocabulary != program.vocabulary:
            raise UsageError(
                f"'{file}' has a vocabulary of {decoder.vocabulary} tokens and '{name}' one of {program.vocabulary}.",
                "Give the model that was converted.",
            )


def _write_originals(
    program: Program, folder: Path, int8: bool, threads: int
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Write the original in every form it has, each compared with the original in PyTorch.

    Returns:
        Files by form, and a sentence for every form that there is not.
    """
    translated = original_to_onnx(with_plain_caches(program))
    ids = torch.from_numpy(random_ids(program.known_tokens, min(_CHECKED, program.max_positions or _CHECKED)))
    with torch.inference_mode():
        expected = original_scorer(program)(ids)
    forms, notes = [OriginalForm.GROUPED, OriginalForm.PRODUCTS, OriginalForm.ATTENTION], []
    written: dict[OriginalForm, Path] = {}
    scales: list[tuple[float, float]] = []
    for form in [*forms, *([OriginalForm.GROUPED_INT8] if int8 else [])]:
        path = folder / f"{form.name.lower()}.onnx"
        try:
            if form == OriginalForm.GROUPED_INT8:
                if OriginalForm.GROUPED not in written:
                    raise RefusedError(
                        "Its int8 scales are measured on the float32 form, which the original does not have.",
                        "Take another form.",
                    )
                scales = _scales(OnnxDecoder(written[OriginalForm.GROUPED], threads=threads), ids.numpy())
            write_original(translated, path, form, metadata={"form": form.value}, scales=scales)
            decoder = OnnxDecoder(path, threads=threads)
            got = torch.from_numpy(decoder.logits(ids.numpy()))
        except MlaCompileError as error:
            if form == OriginalForm.PRODUCTS:
                raise
            notes.append(f"no {form}: {error.message}")
            continue
        if form != OriginalForm.GROUPED_INT8:
            require_equal(f"The original's file with {form}", "the original", relative_error(got, expected))
        written[form] = path
    return {form.value: path for form, path in written.items()}, tuple(notes)


def _scales(decoder: OnnxDecoder, ids: np.ndarray) -> list[tuple[float, float]]:
    """What a step of a byte is worth, of every layer's keys and values: the largest number seen is 127."""
    cache = decoder.empty_cache(*ids.shape)
    decoder.step(ids, np.ones_like(ids), np.arange(ids.shape[1])[None], cache)
    memory = [m.numbers for m in cast(StaticCache, cache).memory]
    largest = [float(np.abs(numbers).max()) / 127 or 1.0 for numbers in memory if numbers is not None]
    return list(zip(largest[::2], largest[1::2], strict=True))


def _alone(name: str, original: bool, path: Path, decoder: OnnxDecoder, context: int, workload: Workload) -> File:
    """Load and run a file in a process of its own."""
    sizes = ["--threads", workload.threads, "--context", context, "--batch", max(workload.batches)]
    kernel = ["--kernel", "fused" if decoder.fused else "standard"]
    command = [sys.executable, "-m", "mla_compile.runtime.onnx_timing", path.absolute(), *sizes, *kernel]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["it was killed"])[-1][:200]
        raise UsageError(
            f"{name} does not run in a process of its own at {context} tokens and batch {max(workload.batches)} "
            f"({reason}).",
            "Give smaller --contexts or --batches.",
        )
    found = json.loads(result.stdout)
    return File(name, original, found["load_seconds"], found["peak_bytes"], decoder.cache_bytes_per_token)


def _clock(threads: int) -> Callable[[], float]:
    """CPU time, which others' work does not count for; with several threads it would be the sum of theirs."""
    return time.process_time if threads == 1 else time.perf_counter


def _best(times: Mapping[str, Sequence[float]], originals: Sequence[str], int8: bool) -> str:
    """The fastest original; those with bytes are for files with bytes."""
    allowed = [name for name in originals if int8 or name != OriginalForm.GROUPED_INT8]
    return min(allowed, key=lambda name: statistics.median(times[name]))


def _holds_bytes(decoder: OnnxDecoder, name: str) -> bool:
    config: Mapping[str, Any] = decoder.metadata.get("config", {})
    return name == OriginalForm.GROUPED_INT8 or config.get("cache_type") == "int8"


def _prompts(
    opened: Mapping[str, OnnxDecoder], originals: Sequence[str], context: int, threads: int
) -> tuple[dict[str, Any], list[Prefill]]:
    """Run one prompt through every file; its caches are what steps are measured with.

    The first run of each is not counted: it is then that memory is taken.
    """
    ids = random_ids(min(d.known_tokens for d in opened.values()), context)[:, : context - 1]
    clock = _clock(threads)
    times: dict[str, list[float]] = {name: [] for name in opened}
    caches: dict[str, Any] = {}
    begin = time.perf_counter()
    for decoder in opened.values():
        filled(decoder, ids, context, clock)
    for _ in range(3):
        for name, decoder in opened.items():
            caches[name], seconds = filled(decoder, ids, context, clock)
            times[name].append(seconds)
        if time.perf_counter() - begin > _PATIENCE:
            break
    best = _best(times, originals, int8=False)
    rows = [
        Prefill(name, ids.shape[1], statistics.median(found), spread(times[best], found))
        for name, found in times.items()
    ]
    return caches, rows


def _steps(
    opened: Mapping[str, OnnxDecoder],
    originals: Sequence[str],
    caches: Mapping[str, Any],
    context: int,
    batch: int,
    workload: Workload,
) -> list[Step]:
    """Measure one setting; originals must agree on the logits first."""
    ids = random_ids(min(d.known_tokens for d in opened.values()), context)
    given = last_token(ids, batch)
    runs, held, logits = {}, {}, {}
    for name, decoder in opened.items():
        cache = caches[name] if batch == 1 else caches[name].repeated(batch)
        logits[name], after = decoder.step(*given, cache)
        held[name] = decoder.measured_bytes(after)
        runs[name] = decoder.repeatable(*given, cache)
    first, *others = (name for name in originals if name != OriginalForm.GROUPED_INT8)
    for other in others:
        error = relative_error(*(torch.from_numpy(logits[name]) for name in (other, first)))
        require_equal(f"The original's file with {other}", f"the one with {first}", error)
    times = turns(runs, workload.rounds, _clock(workload.threads))
    rows = []
    for name, found in times.items():
        best = _best(times, originals, _holds_bytes(opened[name], name))
        speedup = spread(times[best], found)
        rows.append(Step(name, context, batch, statistics.median(found), held[name], speedup))
    return rows
