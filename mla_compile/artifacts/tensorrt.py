"""From a converted model to a file for TensorRT, checked in ONNX Runtime, and an engine, checked against the file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from mla_compile.artifacts.archives import read_folder
from mla_compile.artifacts.companions import copy_assets, finished, read_assets
from mla_compile.artifacts.onnx_files import file_metadata
from mla_compile.artifacts.places import check_cache_type, check_neighbours, check_place, check_target
from mla_compile.disk.writing import moved_into
from mla_compile.errors import LoadError, UsageError, VerificationError
from mla_compile.passes.lower_tensorrt import lower_to_tensorrt_onnx
from mla_compile.passes.retype_onnx import is_narrow_file, write_float32_copy
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import Report
from mla_compile.runtime.fixed_cache import FixedCacheDecoder
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_cache import PAST
from mla_compile.runtime.tensorrt.engine import TensorRTDecoder, facts_path
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings, build_engine, use_plugins
from mla_compile.runtime.tensorrt.installed import architecture, require_device, require_tensorrt
from mla_compile.runtime.tensorrt.reference import OnnxFixedDecoder
from mla_compile.text.evaluate import relative_error
from mla_compile.verification.agreement import in_float32, require_equal

__all__ = [
    "ENGINE_TOLERANCE",
    "TensorRTFiles",
    "check_settings",
    "check_tensorrt",
    "commands",
    "write_compiled",
    "write_for_tensorrt",
]

ENGINE_TOLERANCE = 2e-2
"""Largest relative logit difference of an engine: it may multiply float32 matrices as TF32, which has 10 bits of a
fraction, an error of 5e-4 each time, and tens of layers follow one another."""
NARROW_TOLERANCE = 8 * ENGINE_TOLERANCE
"""The same in float16 and bfloat16, the latter of which has 3 bits fewer than TF32."""
_OF_ENGINES = {
    "timing_cache": "--timing-cache",
    "version_compatible": "--version-compatible",
    "weight_streaming": "--weight-streaming",
    "refit": "--refit",
    "plugins": "--no-plugins",
}
"""Settings of which a file has nothing, as options."""
_OF_FILES = {"room": "--max-length", "splits": "--splits"}
"""Settings that are constants of a file, as options."""
_PROMPT, _TOKENS = 5, 9
"""Tokens that are compared: of a prompt, and with those of a step that runs, and of steps that are replayed."""


@dataclass(frozen=True, slots=True)
class TensorRTFiles:
    """What was made.

    Attributes:
        onnx: The file for TensorRT.
        plan: The engine, if one was asked for.
        error: Largest relative difference of logits between ONNX Runtime and PyTorch; None for a file given.
        engine_error: The same between the engine and ONNX Runtime; None without an engine.
        attention: What runs an engine's attention; empty without one.
    """

    onnx: Path
    plan: Path | None
    error: float | None
    engine_error: float | None = None
    attention: str = ""


def check_tensorrt(path: Path, force: bool) -> None:
    """Refuse what cannot be written or built here, before any work is done.

    Raises:
        UsageError: The name is neither ``.onnx`` nor ``.plan``, or something exists there already; or TensorRT or a GPU
            is missing and an engine was asked for.
    """
    if path.suffix not in (".onnx", ".plan"):
        raise UsageError(
            f"'{path}' is neither named like an ONNX file nor like an engine.", "Name it with .onnx or .plan."
        )
    if path.suffix == ".plan":
        require_tensorrt()
        require_device()
        check_place(path, force)
        check_place(facts_path(path), force)
    check_target(path.with_suffix(".onnx"), force)


def check_settings(path: Path, settings: EngineSettings, *, written: bool = False) -> None:
    """Refuse settings that nothing would follow, and a file of times that cannot be written, before any work is done.

    Args:
        path: What is to be made: with the suffix ``.plan`` an engine, else the file that engines are built of.
        settings: What was asked for.
        written: Whether the file is there already, and only the engine is to be made.

    Raises:
        UsageError: A setting is of an engine and none is built, or of a file and none is written; or the times cannot
            be kept where they are to be.
        LoadError: They are there already, and cannot be read.
    """
    built = path.suffix == ".plan"
    idle = _given(settings, _OF_FILES) if written else () if built else _given(settings, _OF_ENGINES)
    if idle and written:
        raise UsageError(
            f"{', '.join(idle)}: the file that the engine is built of has that already.",
            "Leave it out, or write another file of the converted folder.",
        )
    if idle:
        raise UsageError(
            f"{', '.join(idle)}: only an engine is built so, and '{path}' is none.",
            "Name an engine, with the suffix .plan, or leave it out.",
        )
    if settings.timing_cache is not None:
        _check_times(settings.timing_cache)


def _given(settings: EngineSettings, options: Mapping[str, str]) -> tuple[str, ...]:
    """Names of those options whose settings are not the defaults."""
    usual = EngineSettings()
    return tuple(option for field, option in options.items() if getattr(settings, field) != getattr(usual, field))


def _check_times(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder.", "Name a file with --timing-cache.")
    try:
        if path.exists():
            path.open("rb").close()
    except OSError as error:
        raise LoadError(f"'{path}' cannot be read ({error.strerror}).", "Name another --timing-cache.") from error
    check_place(path, force=True)


def write_for_tensorrt(
    source: Path, path: Path, settings: EngineSettings, *, force: bool = False, stages: Stages | None = None
) -> TensorRTFiles:
    """Write a file for TensorRT, or an engine with its file beside it, from what was converted before.

    Args:
        source: A folder written by ``mla-compile convert MODEL --out FOLDER``; for an engine also a file for TensorRT,
            which may have been written on another machine.
        path: The ``.onnx`` or ``.plan`` file.
        settings: Sizes, and how an engine is built.
        force: Replace existing files.
        stages: Times and shows what runs.

    Raises:
        LoadError: There is no converted model.
        RefusedError: A layer has something that this target does not cover, or TensorRT does not build an engine.
        UsageError: See :func:`check_tensorrt`.
        VerificationError: ONNX Runtime or the engine computes something else.
    """
    stages = stages or Stages()
    if source.suffix == ".onnx":
        if path.suffix != ".plan":
            raise UsageError(f"'{source}' is a file already.", "Name an engine, with the suffix .plan, to build of it.")
        check_settings(path, settings, written=True)
        check_tensorrt(path, force=True)  # the file is beside the engine already, as a rule
        check_place(path, force)
        with _in_onnx_runtime(source) as decoder:
            metadata = decoder.metadata
        with _beside(path, source.parent, force) as hidden:
            engine_error, attention = _build(source, hidden / path.name, settings, metadata, stages)
        return TensorRTFiles(source, path, None, engine_error, attention)
    check_settings(path, settings)
    check_tensorrt(path, force)
    model, assets = read_folder(source), read_assets(source)
    facts = {"schema_version": 1, "source": source.name, "eos_token_id": assets.generation.get("eos_token_id")}
    with _beside(path, source, force) as hidden:
        return _write(model, facts, hidden, path, _within(settings, assets), stages)


@contextmanager
def _beside(path: Path, source: Path, force: bool) -> Iterator[Path]:
    """Give a hidden folder for files at ``path``, to which what is beside ``source`` is added."""
    assets = read_assets(source)
    if not (path.parent.is_dir() and path.parent.samefile(source)):
        check_neighbours(path, str(source), assets, force)
    with moved_into(path.parent) as hidden:
        yield hidden
        copy_assets(assets, hidden)


def _within(settings: EngineSettings, assets: Assets) -> EngineSettings:
    """No more room than a model's longest sequence takes, where its configuration says that."""
    return dataclasses.replace(settings, room=min(settings.room, assets.longest or settings.room))


def write_compiled(
    model: LatentModel,
    report: Report,
    assets: Assets,
    path: Path,
    settings: EngineSettings,
    force: bool,
    stages: Stages,
) -> Report:
    """Write what was converted in this process; see :meth:`mla_compile.CompiledModel.to_tensorrt`.

    Args:
        model: The converted model.
        report: What was done so far.
        assets: Configuration and tokenizer.
        path: The ``.onnx`` or ``.plan`` file.
        settings: Sizes, and how an engine is built.
        force: Replace existing files.
        stages: Times and shows what runs.

    Returns:
        The completed report, also written as ``report.json`` beside the files.
    """
    check_cache_type(path, report.config["cache_type"], tensorrt=True)
    check_settings(path, settings)
    check_tensorrt(path, force)
    check_neighbours(path, report.source, assets, force)
    with moved_into(path.parent) as hidden:
        written = _write(model, file_metadata(report, assets), hidden, path, _within(settings, assets), stages)
        if report.verification is not None:
            checked = dataclasses.replace(
                report.verification, lowering_error=written.error, engine_error=written.engine_error
            )
            report = dataclasses.replace(report, verification=checked)
        copy_assets(assets, hidden)
        return finished(dataclasses.replace(report, target="tensorrt"), hidden, stages)


def _write(
    model: LatentModel,
    metadata: Mapping[str, Any],
    hidden: Path,
    path: Path,
    settings: EngineSettings,
    stages: Stages,
) -> TensorRTFiles:
    """Write a file for TensorRT, and if ``path`` is named so an engine of it, into a hidden folder.

    Args:
        model: The converted model.
        metadata: JSON-able facts for the file and the engine.
        hidden: Where to write.
        path: Where it will be.
        settings: Sizes, and how an engine is built.
        stages: Times and shows what runs.

    Raises:
        RefusedError: A layer has something that this target does not cover, or TensorRT does not build an engine.
        VerificationError: ONNX Runtime or the engine computes something else.
    """
    file = hidden / path.with_suffix(".onnx").name
    graph = model.graph
    metadata = {**metadata, "known_tokens": model.known_tokens}
    with stages.stage("lower to ONNX"):
        facts = {**metadata, "target": "tensorrt"}
        lower_to_tensorrt_onnx(graph, model.rows, file, room=settings.room, metadata=facts, splits=settings.splits)
    with stages.stage("verify ONNX"):
        wide = in_float32(model)
        with _in_onnx_runtime(file) as decoder:
            error = _difference(decoder, lambda ids: wide(ids).logits)
        require_equal("ONNX Runtime", "the converted PyTorch module", error)
    if path.suffix != ".plan":
        return TensorRTFiles(path, None, error)
    engine_error, attention = _build(file, hidden / path.name, settings, metadata, stages)
    return TensorRTFiles(path.with_suffix(".onnx"), path, error, engine_error, attention)


def _build(
    file: Path, plan: Path, settings: EngineSettings, metadata: Mapping[str, Any], stages: Stages
) -> tuple[float, str]:
    """Build an engine of a file, and compare it with the file in ONNX Runtime."""
    trt = require_tensorrt()
    absent = use_plugins() if settings.plugins else "as asked"
    with stages.stage("build engine", 100) as stage:
        engine, layers = build_engine(trt, file, settings, plugins=not absent, advance=stage)
        attention = f"{layers} plugins" if layers else f"standard operators ({absent or 'TensorRT took no plugin'})"
        stage.note = f"attention: {attention}"
    plan.write_bytes(engine)
    facts = {
        **metadata,
        "tensorrt": trt.__version__,
        "device": torch.cuda.get_device_name(),
        "compute_capability": architecture(),
        "version_compatible": settings.version_compatible,
        "weight_streaming": settings.weight_streaming,
        "refit": settings.refit,
        "plugin_layers": layers,
        "onnx": file.name,
        "onnx_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    facts_path(plan).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with stages.stage("verify engine"), _in_onnx_runtime(file) as reference:
        error = _difference(TensorRTDecoder(plan), lambda ids: torch.from_numpy(reference.logits(ids.numpy())))
    tolerance = NARROW_TOLERANCE if is_narrow_file(file) else ENGINE_TOLERANCE
    if not error <= tolerance:
        raise VerificationError(
            f"The engine differs from its file in ONNX Runtime by {error:.1e} of the largest logit (allowed: "
            f"{tolerance:.0e}).",
            "No output was kept. Try --no-plugins, and report which of the two differs.",
        )
    return error, attention


@contextmanager
def _in_onnx_runtime(file: Path) -> Iterator[OnnxFixedDecoder]:
    """A file in ONNX Runtime, computing in float32 whatever the file is in; while the block lasts."""
    if not is_narrow_file(file):
        yield OnnxFixedDecoder(file)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        write_float32_copy(file, copy)
        yield OnnxFixedDecoder(copy)


def _difference(decoder: FixedCacheDecoder, reference: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Largest relative difference of logits between a prompt and some steps, and whole sequences at once."""
    batch, tokens = min(2, decoder.limits.batch or 2), min(_TOKENS, decoder.limits.room)
    prompt = max(1, tokens - _TOKENS + _PROMPT)
    ids = torch.arange(batch * tokens).view(batch, tokens) % decoder.vocabulary  # small ids: every vocabulary has them
    cache, done, parts = decoder.empty_cache(batch), 0, []
    for part in ids.split([prompt, *[1] * (tokens - prompt)], 1):
        positions = np.tile(np.arange(done, done + part.shape[1]), (batch, 1))
        done += part.shape[1]
        logits, cache = decoder.step(part.numpy(), np.ones((batch, done), np.int64), positions, cache)
        parts.append(torch.from_numpy(logits))
    with torch.inference_mode():
        return relative_error(torch.cat(parts, 1), reference(ids))


def commands(path: Path, settings: EngineSettings, library: Path | None = None) -> tuple[str, str]:
    """What TensorRT's own tools make of a file.

    Args:
        path: The file.
        settings: Sizes.
        library: A library of plugins; without one there are standard operators only.

    Returns:
        How ``trtexec`` builds an engine of one profile, and how ``polygraphy`` lists what TensorRT takes.
    """
    inputs = onnx.load(path, load_external_data=False).graph.input
    extents = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in inputs}
    prompt = min(settings.prompt, extents[PAST.format(0)][2])

    def shapes(*free: int) -> str:
        return ",".join(
            f"{name}:{'x'.join(str(extent or free[axis]) for axis, extent in enumerate(shape))}"
            for name, shape in extents.items()
        )

    return (
        f"trtexec --onnx={path} --saveEngine={path.with_suffix('.trtexec.plan')} --skipInference "
        f"--minShapes={shapes(1, 1)} --optShapes={shapes(settings.batch, 1)} "
        f"--maxShapes={shapes(settings.batch, prompt)}"
        + (f" --dynamicPlugins={library} --preview=+aliasedPluginIO1003" if library else ""),
        f"polygraphy inspect capability {path}",
    )
