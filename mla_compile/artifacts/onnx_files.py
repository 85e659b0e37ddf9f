"""Converted models as ONNX files, each checked in ONNX Runtime before it gets its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mla_compile.artifacts.companions import copy_assets, finished
from mla_compile.artifacts.genai import write_genai_config
from mla_compile.artifacts.places import check_neighbours, check_onnx_target, check_pair
from mla_compile.disk.writing import moved_into
from mla_compile.passes.lower_encoder import EncoderFace, lower_encoder_to_onnx
from mla_compile.passes.lower_onnx import CacheForm, lower_to_onnx
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import Report, environment
from mla_compile.reporting.encoder_report import EncoderReport
from mla_compile.reporting.seq2seq_report import Seq2SeqReport
from mla_compile.runtime.module import LatentModel, LatentSeq2Seq, LowRankModel
from mla_compile.verification.encoders import check_encoder_onnx, check_seq2seq_onnx
from mla_compile.verification.onnx import check_lowering

__all__ = [
    "file_metadata",
    "lower_and_check",
    "stored_metadata",
    "write_encoder_onnx",
    "write_onnx",
    "write_seq2seq_onnx",
]

_UNTRIED = "the file is for ONNX Runtime's CUDA provider, which was not there to run it on: this target is experimental"


def write_onnx(
    module: LatentModel, report: Report, assets: Assets, path: Path, checks: Tensor | None, force: bool, stages: Stages
) -> Report:
    """Lower, verify in ONNX Runtime, and only then give the file its name.

    Args:
        module: The converted model.
        report: What was done so far.
        assets: Configuration and tokenizer.
        path: The ``.onnx`` file.
        checks: Token ids to compare on; None to skip the comparison.
        force: Replace existing files.
        stages: Times and shows what runs.

    Returns:
        The completed report, also written as ``report.json`` beside the file.
    """
    check_onnx_target(path, report.source, assets, force, report.config["cache_layout"])
    with moved_into(path.parent) as folder:
        found, warnings = lower_and_check(
            module,
            folder / path.name,
            report.config,
            file_metadata(report, assets),
            assets,
            checks,
            report.cache_bytes_after,
            stages,
        )
        report = dataclasses.replace(report, warnings=(*report.warnings, *warnings))
        if report.verification is not None:
            report = dataclasses.replace(report, verification=dataclasses.replace(report.verification, **found))
        copy_assets(assets, folder)
        return finished(report, folder, stages)


def lower_and_check(
    module: LatentModel,
    file: Path,
    form: Mapping[str, Any],
    metadata: Mapping[str, object],
    assets: Assets,
    checks: Tensor | None,
    cache_bytes: int,
    stages: Stages,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Write a converted model as ONNX in the form that its settings say, and compare the two.

    Args:
        module: The converted model.
        file: The ``.onnx`` file, in a folder from which it is moved if nothing is raised.
        form: Settings of the conversion, of which those of the file are read.
        metadata: What the file says of itself.
        assets: Configuration, for what onnxruntime-genai is told.
        checks: Token ids to compare on; None to skip the comparison.
        cache_bytes: Bytes per token that the file's cache should have.
        stages: Times and shows what runs.

    Returns:
        What was measured on the file, as fields of :class:`~mla_compile.report.Verification`, and what the user should
        know of it.

    Raises:
        RefusedError: A layer's cache cannot be quantised, or has no ONNX form.
        VerificationError: ONNX Runtime computes something else.
    """
    caches = CacheForm.of(form)
    with stages.stage("lower to ONNX"):
        lower_to_onnx(
            module.graph,
            module.rows,
            file,
            opset=form["opset"],
            inline=form["inline"],
            metadata={**metadata, "known_tokens": module.known_tokens},
            caches=caches,
        )
    if caches.halves:
        write_genai_config(file, module.rows, assets, static=caches.static)
    if caches.paged:
        return {}, (_UNTRIED,)
    if checks is None:
        return {}, ()
    with stages.stage("verify ONNX"):
        return check_lowering(module, file, checks, cache_bytes, form["cache_type"]), ()


def write_encoder_onnx(
    module: LowRankModel,
    report: EncoderReport,
    assets: Assets,
    face: EncoderFace,
    path: Path,
    *,
    checks: Sequence[Mapping[str, Tensor]] | None,
    force: bool,
    stages: Stages,
) -> EncoderReport:
    """Lower an encoder, verify it in ONNX Runtime, and only then give the file its name.

    Args:
        module: The converted model.
        report: What was done so far.
        assets: Configuration and tokenizer.
        face: Its inputs and outputs.
        path: The ``.onnx`` file.
        checks: Inputs to compare on; None to skip the comparison.
        force: Replace existing files.
        stages: Times and shows what runs.

    Returns:
        The completed report, also written as ``report.json`` beside the file.
    """
    check_onnx_target(path, report.source, assets, force)
    with moved_into(path.parent) as folder:
        with stages.stage("lower to ONNX"):
            lower_encoder_to_onnx(
                module.graph,
                face,
                folder / path.name,
                opset=report.config["opset"],
                metadata={"schema_version": 1, "source": Path(report.source).name, "config": dict(report.config)},
            )
        if checks is not None:
            with stages.stage("verify ONNX"):
                error = check_encoder_onnx(module, folder / path.name, checks)
            if report.verification is not None:
                checked = dataclasses.replace(report.verification, lowering_error=error)
                report = dataclasses.replace(report, verification=checked)
        copy_assets(assets, folder)
        return finished(report, folder, stages)


def write_seq2seq_onnx(
    module: LatentSeq2Seq,
    report: Seq2SeqReport,
    assets: Assets,
    face: EncoderFace,
    path: Path,
    *,
    tokens: str,
    checks: Sequence[Mapping[str, Tensor]] | None,
    force: bool,
    stages: Stages,
) -> Seq2SeqReport:
    """Lower an encoder-decoder to two files, verify both together, and only then give them their names.

    Args:
        module: The converted model.
        report: What was done so far.
        assets: Configuration and tokenizer.
        face: Inputs and outputs of the encoder's part.
        path: The decoder's ``.onnx`` file; the encoder's is ``X.encoder.onnx`` beside it.
        tokens: Name of the decoder's token input in ``checks``.
        checks: Inputs to compare on; None to skip the comparison.
        force: Replace existing files.
        stages: Times and shows what runs.

    Returns:
        The completed report, also written as ``report.json`` beside the files.
    """
    check_pair(path, force)
    other = path.with_suffix(".encoder.onnx")
    check_neighbours(path, report.source, assets, force)
    facts = {"schema_version": 1, "source": Path(report.source).name, "config": dict(report.config)}
    with moved_into(path.parent) as folder:
        with stages.stage("lower to ONNX"):
            opset = report.config["opset"]
            encoder = module.encoder.graph
            decoder = module.decoder.graph
            lower_encoder_to_onnx(encoder, face, folder / other.name, opset=opset, metadata=facts)
            lower_to_onnx(
                decoder,
                module.decoder.rows,
                folder / path.name,
                opset=opset,
                inline=report.config["inline"],
                metadata=facts,
                cross=[p.elements_after for p in report.cross_plans],
                masked=module.mask is not None,
            )
        if checks is not None:
            with stages.stage("verify ONNX"):
                files = (folder / other.name, folder / path.name)
                error = check_seq2seq_onnx(module, files, tokens, checks)
            if report.verification is not None:
                checked = dataclasses.replace(report.verification, lowering_error=error)
                report = dataclasses.replace(report, verification=checked)
        copy_assets(assets, folder)
        return finished(report, folder, stages)


def file_metadata(report: Report, assets: Assets) -> dict[str, object]:
    """What the ONNX file of a conversion says of itself."""
    layers = [dataclasses.asdict(p) for p in report.plans]
    sizes = (report.cache_bytes_before, report.cache_bytes_after)
    return stored_metadata(report.source, report.config, layers, sizes, assets)


def stored_metadata(
    source: str,
    config: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    cache_bytes: tuple[int, int],
    assets: Assets,
) -> dict[str, object]:
    """What an ONNX file says of itself: enough to run it and to know where it came from.

    Args:
        source: The model.
        config: Settings of its conversion.
        layers: The latent shape of every converted layer.
        cache_bytes: Bytes per token before and after.
        assets: Configuration and tokenizer.
    """
    before, after = cache_bytes
    return {
        "schema_version": 1,
        "source": Path(source).name,
        "environment": environment(),
        "config": dict(config),
        "layers": list(layers),
        "cache_bytes_per_token": after,
        "original_cache_bytes_per_token": before,
        "bos_token_id": assets.generation.get("bos_token_id"),
        "eos_token_id": assets.generation.get("eos_token_id"),
        "max_position_embeddings": assets.longest,
    }
