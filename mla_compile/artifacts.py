"""Write results so that a name either holds a whole, verified artefact or nothing new.

Everything is written into a hidden folder beside the target and moved into place at the end.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor, fx

from mla_compile import verify
from mla_compile.encoder_report import EncoderReport
from mla_compile.errors import LoadError, UsageError
from mla_compile.genai import write_genai_config
from mla_compile.passes.lower_onnx import (
    EncoderFace,
    export_encoder,
    export_rewritten,
    lower_encoder_to_onnx,
    lower_to_onnx,
)
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import Report, environment
from mla_compile.report_page import PAGE, damage_explained, render_page, write_report
from mla_compile.runtime.module import LatentModel, LatentSeq2Seq, LowRankModel
from mla_compile.seq2seq_report import Seq2SeqReport
from mla_compile.writing import explained, held, missing_folders, remove_empty

__all__ = [
    "check_cache_layout",
    "check_cache_type",
    "check_neighbours",
    "check_pair",
    "check_place",
    "check_target",
    "copy_assets",
    "file_metadata",
    "finished",
    "is_converted_folder",
    "moved_into",
    "read_assets",
    "read_folder",
    "stored_metadata",
    "write_archive",
    "write_encoder_folder",
    "write_encoder_onnx",
    "write_folder",
    "write_onnx",
    "write_page",
    "write_seq2seq_onnx",
]

_HIDDEN = ".mla-compile-"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_PROVENANCE = ("custom", "from_node", "nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")
"""What torch writes of every node besides what it computes."""

_UNTRIED = "the file is for ONNX Runtime's CUDA provider, which was not there to run it on: this target is experimental"
_AnyReport = TypeVar("_AnyReport", Report, EncoderReport, Seq2SeqReport)


def check_target(path: Path, force: bool) -> None:
    """Refuse a target that cannot be written, before any work is done.

    Raises:
        UsageError: The name is not one this version writes, exists already, or its folder cannot be written.
    """
    if path.name == ".onnx":
        raise UsageError(f"'{path}' is only a suffix.", "Name a file, such as model.onnx.")
    if path.suffix and path.suffix != ".onnx":
        raise UsageError(
            f"'{path}' does not say what to write: '{path.suffix}' is not known.",
            "Name a .onnx, .plan or .gguf file, or a folder without a suffix.",
        )
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(
            "ONNX Runtime, which every ONNX file is checked with, is not installed.",
            "Run: pip install 'mla-compile[cpu]'.",
        )
    if path.suffix == ".onnx" and path.is_dir():
        raise UsageError(f"'{path}' is a folder.", "Name a .onnx file.")
    if not path.suffix and path.is_file():
        raise UsageError(f"'{path}' is a file.", "Name a .onnx file, or a folder.")
    _check_free(path.with_name(f"{path.name}.data"), force)
    check_place(path, force)


def check_cache_type(path: Path, cache_type: str, *, tensorrt: bool = False) -> None:
    """Refuse a quantised cache where caches hold floats: anywhere but in an ONNX file that is not for TensorRT.

    Raises:
        UsageError: It cannot be quantised there.
    """
    if cache_type == "int8" and (tensorrt or path.suffix != ".onnx"):
        raise UsageError(
            f"Only an ONNX file for ONNX Runtime has an int8 cache, and '{path}' is none.",
            "Name a .onnx file without --target tensorrt, or leave --cache-type int8 out; "
            "mla-compile export writes such a file of a folder.",
        )


def check_cache_layout(path: Path, layout: str, *, tensorrt: bool = False) -> None:
    """Refuse another layout than rows anywhere but in an ONNX file that is not for TensorRT.

    Raises:
        UsageError: There is no such layout there.
    """
    if layout != "rows" and (tensorrt or path.suffix != ".onnx"):
        raise UsageError(
            f"Only an ONNX file for ONNX Runtime has the cache layout {layout}, and '{path}' is none.",
            "Name a .onnx file, without --target tensorrt, or leave --cache-layout and --target out.",
        )


def check_place(path: Path, force: bool) -> None:
    """Refuse a file or folder that cannot be made.

    Raises:
        UsageError: Something exists there already, or its folder cannot be written.
    """
    _check_free(path, force)
    parent = path if path.is_dir() else path.parent
    existing = next((p for p in (parent, *parent.absolute().parents) if p.exists()), None)
    if existing is None or not existing.is_dir():
        raise UsageError(f"The folder of '{path}' cannot be created.", "Choose another folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(f"'{existing}' cannot be written ({error.strerror}).", "Choose another folder.") from error


def _check_free(path: Path, force: bool) -> None:
    occupied = path.is_file() or (path.is_dir() and any(not p.name.startswith(_HIDDEN) for p in path.iterdir()))
    if occupied and not force:
        raise UsageError(f"'{path}' exists already.", "Choose another name, or pass --force to replace it.")


def check_pair(path: Path, force: bool) -> None:
    """Refuse targets of an encoder-decoder that cannot be written, before any work is done.

    Raises:
        UsageError: The name is not that of an ONNX file, or one of the two files cannot be written.
    """
    if path.suffix != ".onnx":
        raise UsageError(
            f"'{path}' is not named like an ONNX file, and an encoder-decoder is written as two of them.",
            "Name it with the suffix .onnx.",
        )
    for target in (path, path.with_suffix(".encoder.onnx")):
        check_target(target, force)


def check_neighbours(path: Path, source: str, assets: Assets, force: bool) -> None:
    """Refuse to put a model's files beside those of another, before any work is done.

    Raises:
        UsageError: Configuration, tokenizer or report of something else lies where this model's would go, or it is the
            folder of the original, which is never written to.
    """
    folder = path.parent if path.suffix in (".onnx", ".plan", ".gguf") else path
    if Path(source).is_dir() and folder.exists() and folder.samefile(source):
        raise UsageError(f"'{folder}' is the folder of the original model.", "Choose another folder.")
    if force:
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy_assets(assets, Path(scratch))
        for new in sorted(Path(scratch).iterdir()):
            old = folder / new.name
            if old.is_file() and old.read_bytes() != new.read_bytes():
                raise _belongs_to_another(old)
    report, page = folder / "report.json", folder / PAGE
    if report.is_file() and not _is_report(report):
        raise _belongs_to_another(report)
    if page.is_file() and not report.is_file():
        raise _belongs_to_another(page)


def _check_onnx_target(path: Path, source: str, assets: Assets, force: bool) -> None:
    """Refuse an ONNX file that cannot be written where it is to go.

    Raises:
        UsageError: As :func:`check_target` and :func:`check_neighbours`, or for another suffix.
    """
    check_target(path, force)
    if path.suffix != ".onnx":
        raise UsageError(f"'{path}' is not named like an ONNX file.", "Name it with the suffix .onnx.")
    check_neighbours(path, source, assets, force)


def _is_report(path: Path) -> bool:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored.get("kind") == "encoder" or "bytes_per_token_after" in stored["cache"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _belongs_to_another(path: Path) -> UsageError:
    return UsageError(
        f"'{path}' exists already and belongs to something else.",
        "Choose a folder of its own, or pass --force to replace it.",
    )


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
    _check_onnx_target(path, report.source, assets, force)
    paged = report.config["cache_layout"] == "paged"
    with moved_into(path.parent) as folder:
        with stages.stage("lower to ONNX"):
            lower_to_onnx(
                module.graph,  # type: ignore[arg-type]
                module.rows,
                folder / path.name,
                opset=report.config["opset"],
                inline=report.config["inline"],
                metadata=file_metadata(report, assets),
                static=paged or report.config["cache"] == "static",
                quantised=report.config["cache_type"] == "int8",
                halves=report.config["cache_layout"] == "genai",
                paged=paged,
            )
        if paged:
            report = dataclasses.replace(report, warnings=(*report.warnings, _UNTRIED))
        elif checks is not None:
            with stages.stage("verify ONNX"):
                found = verify.check_lowering(
                    module, folder / path.name, checks, report.cache_bytes_after, report.config["cache_type"]
                )
            if report.verification is not None:
                report = dataclasses.replace(report, verification=dataclasses.replace(report.verification, **found))
        if report.config["cache_layout"] == "genai":
            write_genai_config(folder / path.name, module.rows, assets, static=report.config["cache"] == "static")
        copy_assets(assets, folder)
        report = finished(report, folder, stages)
    return report


def write_folder(module: LatentModel, report: Report, assets: Assets, path: Path, force: bool) -> Report:
    """Write the PyTorch module as a ``torch.export`` archive in a folder of its own."""
    check_cache_type(path, report.config["cache_type"])
    check_target(path, force)
    check_neighbours(path, report.source, assets, force)
    with moved_into(path) as folder:
        write_archive(module, folder)
        copy_assets(assets, folder)
        (folder / "mla_config.yaml").write_text(yaml.safe_dump(dict(report.config), sort_keys=False), encoding="utf-8")
        report = finished(report, folder, Stages())
    return report


def write_archive(module: LatentModel, folder: Path) -> None:
    """Write a model as a ``torch.export`` archive, whose bytes follow from graph and weights alone.

    Where the nodes came from is left out: it names files of this machine, and grows with every export.
    """
    exported = export_rewritten(module.graph, module.rows)  # type: ignore[arg-type]
    for node in exported.graph.nodes:
        for name in _PROVENANCE:
            node.meta.pop(name, None)
    for name, value in exported.state_dict.items():
        if value.numel() * value.itemsize != value.untyped_storage().nbytes():  # a part of a larger tensor
            whole = value.detach().clone()
            exported.state_dict[name] = (
                torch.nn.Parameter(whole, value.requires_grad) if isinstance(value, torch.nn.Parameter) else whole
            )
    torch.export.save(exported, folder / "model.pt2")


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
    _check_onnx_target(path, report.source, assets, force)
    with moved_into(path.parent) as folder:
        with stages.stage("lower to ONNX"):
            lower_encoder_to_onnx(
                module.graph,  # type: ignore[arg-type]
                face,
                folder / path.name,
                opset=report.config["opset"],
                metadata={"schema_version": 1, "source": Path(report.source).name, "config": dict(report.config)},
            )
        if checks is not None:
            with stages.stage("verify ONNX"):
                error = verify.check_encoder_onnx(module, folder / path.name, checks)
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
            encoder: fx.GraphModule = module.encoder.graph  # type: ignore[assignment]
            decoder: fx.GraphModule = module.decoder.graph  # type: ignore[assignment]
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
                error = verify.check_seq2seq_onnx(module, files, tokens, checks)
            if report.verification is not None:
                checked = dataclasses.replace(report.verification, lowering_error=error)
                report = dataclasses.replace(report, verification=checked)
        copy_assets(assets, folder)
        return finished(report, folder, stages)


def write_encoder_folder(
    module: LowRankModel,
    report: EncoderReport,
    assets: Assets,
    face: EncoderFace,
    path: Path,
    force: bool,
) -> EncoderReport:
    """Write an encoder as a ``torch.export`` archive in a folder of its own."""
    check_target(path, force)
    check_neighbours(path, report.source, assets, force)
    with moved_into(path) as folder:
        torch.export.save(export_encoder(module.graph, face), folder / "model.pt2")
        copy_assets(assets, folder)
        (folder / "mla_config.yaml").write_text(yaml.safe_dump(dict(report.config), sort_keys=False), encoding="utf-8")
        return finished(report, folder, Stages())


def is_converted_folder(path: Path) -> bool:
    """Whether a folder was written by :func:`write_folder`."""
    return (path / "mla_config.yaml").is_file() and (path / "model.pt2").is_file()


def read_folder(path: Path) -> LatentModel:
    """Read back what :func:`write_folder` wrote.

    Raises:
        LoadError: The folder holds no such model.
    """
    if not is_converted_folder(path):
        raise LoadError(f"'{path}' holds no converted model.", "Give a folder written by mla-compile.")
    try:
        exported = torch.export.load(path / "model.pt2")
    except Exception as error:
        raise LoadError(f"'{path / 'model.pt2'}' could not be read ({error}).", "Convert the model again.") from error
    module = exported.module(check_guards=False)
    graph = fx.GraphModule(module, module.graph)
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    inputs = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name.startswith("past_")]
    if not inputs:
        raise LoadError(f"'{path}' holds an encoder, which has no cache.", "Read its model.pt2 with torch.export.load.")
    return LatentModel(graph, [int(n.meta["val"].shape[-1]) for n in inputs])


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
        "max_position_embeddings": assets.config.get("max_position_embeddings"),
    }


def copy_assets(assets: Assets, folder: Path) -> None:
    """Write configuration, generation settings and tokenizer into a folder."""
    for name, content in (("config.json", assets.config), ("generation_config.json", assets.generation)):
        if content:
            (folder / name).write_text(
                json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
            )
    local = assets.local_folder
    if local is not None:
        for name in _TOKENIZER_FILES:
            if (local / name).is_file():
                shutil.copyfile(local / name, folder / name)
    elif assets.folder is not None:
        from mla_compile.corpus import load_tokenizer

        load_tokenizer(assets.folder).save_pretrained(folder)
    elif assets.tokenizer is not None:
        assets.tokenizer.save_pretrained(folder)


def read_assets(folder: Path) -> Assets:
    """Read back what :func:`copy_assets` wrote.

    Raises:
        LoadError: A file is damaged.
    """
    stored = {}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        try:
            stored[name] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise LoadError(f"'{path}' is damaged ({error}).", "Convert the model again.") from error
        if not isinstance(stored[name], dict):
            raise LoadError(f"'{path}' holds no settings.", "Convert the model again.")
    tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return Assets(str(folder) if tokenizer else None, stored["config.json"], stored["generation_config.json"])


def finished(report: _AnyReport, folder: Path, stages: Stages) -> _AnyReport:
    """Complete a report with the sizes of what lies in its folder, and write it there."""
    sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    report = dataclasses.replace(report, artifacts=sizes, stages=(*report.stages, *stages.timings))
    write_report(report.to_dict(), folder)
    return report


def write_page(report: Mapping[str, Any], out: Path, measurement: Mapping[str, Any] | None, force: bool) -> None:
    """Write the page of a report.

    Args:
        report: What was read of a ``report.json``.
        out: The ``.html`` file.
        measurement: What ``mla-compile eval --json`` printed, or None.
        force: Replace an existing file.

    Raises:
        UsageError: The name is not that of a page, exists already, or its folder cannot be written.
        LoadError: The report is damaged.
    """
    if out.suffix != ".html":
        raise UsageError(f"'{out}' is not named like a page.", "Name it with the suffix .html.")
    if out.is_dir():
        raise UsageError(f"'{out}' is a folder.", "Name a .html file.")
    check_place(out, force)
    with damage_explained(out):
        page = render_page(report, measurement)
    with moved_into(out.parent) as folder:
        (folder / out.name).write_text(page, encoding="utf-8")


@contextmanager
def moved_into(target: Path) -> Iterator[Path]:
    """Give a hidden folder to write in; on success move its files into ``target``, on failure remove everything.

    What a process that was killed left there is removed first.

    Raises:
        UsageError: Something could not be written.
    """
    created = missing_folders(target)
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{_HIDDEN}*"):
        with held(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    hidden = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=target))
    try:
        with held(hidden), explained(target):
            yield hidden
            for file in sorted(hidden.iterdir()):
                file.replace(target / file.name)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        remove_empty(created)
        raise
    hidden.rmdir()
