"""Converted models as ``torch.export`` archives in folders of their own: written, and read back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx
from torch.export import ExportedProgram

from mla_compile.artifacts.companions import (
    MODEL,
    MODEL_FILES,
    copy_assets,
    finished,
    is_converted_folder,
    write_settings,
    written_files,
)
from mla_compile.artifacts.mapped_archive import load_mapped
from mla_compile.artifacts.places import check_cache_type, check_folder, check_neighbours
from mla_compile.disk.writing import moved_into, require_possible, unseen_errors
from mla_compile.errors import LoadError
from mla_compile.passes.insert_latent import past_name
from mla_compile.passes.lower_encoder import EncoderFace, export_encoder
from mla_compile.passes.lower_onnx import export_rewritten
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import Report
from mla_compile.reporting.encoder_report import EncoderReport
from mla_compile.runtime.module import LatentModel, LowRankModel

__all__ = ["read_folder", "write_archive", "write_encoder_folder", "write_folder"]

_PROVENANCE = ("custom", "from_node", "nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")
"""What torch writes of every node besides what it computes."""


def write_folder(module: LatentModel, report: Report, assets: Assets, path: Path, force: bool) -> Report:
    """Write the PyTorch module as a ``torch.export`` archive in a folder of its own."""
    check_cache_type(path, report.config["cache_type"])
    check_folder(path, force)
    check_neighbours(path, report.source, assets, force)
    with moved_into(path) as folder:
        write_archive(module, folder)
        copy_assets(assets, folder)
        write_settings(report.config, folder)
        report = finished(report, folder, Stages())
    return report


def write_archive(module: LatentModel, folder: Path) -> None:
    """Write a model as a ``torch.export`` archive, whose bytes follow from graph and weights alone.

    Where the nodes came from is left out: it names files of this machine, and grows with every export.
    """
    exported = export_rewritten(module.graph, module.rows)
    for node in exported.graph.nodes:
        for name in _PROVENANCE:
            node.meta.pop(name, None)
    for name, value in exported.state_dict.items():
        if value.numel() * value.itemsize != value.untyped_storage().nbytes():  # a part of a larger tensor
            whole = value.detach().clone()
            exported.state_dict[name] = (
                torch.nn.Parameter(whole, value.requires_grad) if isinstance(value, torch.nn.Parameter) else whole
            )
    _save(exported, folder)


def _save(exported: ExportedProgram, folder: Path) -> None:
    with unseen_errors(folder / MODEL) as file:  # which torch's writer would end the process for
        torch.export.save(exported, file)


def write_encoder_folder(
    module: LowRankModel,
    report: EncoderReport,
    assets: Assets,
    face: EncoderFace,
    path: Path,
    force: bool,
) -> EncoderReport:
    """Write an encoder as a ``torch.export`` archive in a folder of its own."""
    check_folder(path, force)
    check_neighbours(path, report.source, assets, force)
    with moved_into(path) as folder:
        _save(export_encoder(module.graph, face), folder)
        copy_assets(assets, folder)
        write_settings(report.config, folder)
        return finished(report, folder, Stages())


def read_folder(path: Path) -> LatentModel:
    """Read back what :func:`write_folder` wrote.

    Raises:
        LoadError: The folder holds no such model.
    """
    require_possible(path)
    if not is_converted_folder(path):
        if path.suffix in MODEL_FILES and path.is_file():
            raise LoadError(
                f"'{path}' is a model as a file, and this takes one as a folder.",
                "Write that by: mla-compile MODEL --out FOLDER.",
            )
        if path.name == MODEL and is_converted_folder(path.parent):
            raise LoadError(f"'{path}' is a part of a converted model.", f"Give the folder: {path.absolute().parent}.")
        if files := written_files(path):
            raise LoadError(
                f"'{path}' holds a model as a file, '{files[0].name}', and this takes one as a folder.",
                "Write that by: mla-compile MODEL --out FOLDER.",
            )
        raise LoadError(f"'{path}' holds no converted model.", "Give a folder written by mla-compile.")
    try:
        exported = load_mapped(path / MODEL)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"'{path / MODEL}' could not be read ({error}).", "Convert the model again.") from error
    module = exported.module(check_guards=False)
    graph = fx.GraphModule(module, module.graph)
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()
    inputs = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    pasts = [inputs[name] for i in range(len(inputs)) if (name := past_name(i)) in inputs]
    if not pasts:
        raise LoadError(f"'{path}' holds an encoder, which has no cache.", "Read its model.pt2 with torch.export.load.")
    return LatentModel(graph, [int(n.meta["val"].shape[-1]) for n in pasts])
