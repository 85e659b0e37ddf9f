"""``mla-compile fuse``: a file and a library with the fused kernel, for ONNX Runtime where mla-compile is not."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from mla_compile.artifacts.companions import copy_assets
from mla_compile.artifacts.genai import assets_beside, genai_config_of, with_file, write_config
from mla_compile.artifacts.places import check_onnx_suffix, check_place, require_file
from mla_compile.disk.writing import moved_into
from mla_compile.errors import LoadError, RefusedError, UsageError
from mla_compile.program import Assets
from mla_compile.runtime.cpu.fused import FUSED_CACHES, fused_model
from mla_compile.runtime.cpu.library import compile_library
from mla_compile.runtime.onnx_variant import FUSED_DOMAIN

__all__ = ["is_fused", "write_fused"]


def is_fused(model: Path) -> bool:
    """Whether a file needs the library of the fused kernel.

    Raises:
        LoadError: It is no ONNX file.
    """
    try:
        opened = onnx.load(model, load_external_data=False)
    except Exception as error:  # protobuf's own, and onnx's
        raise _no_file(model) from error
    return any(opset.domain == FUSED_DOMAIN for opset in opened.opset_import)


def write_fused(model: Path, out: Path, *, march: str = "native", force: bool = False) -> Path:
    """Write a file whose attention nodes use the fused kernel, and the library of its operators.

    A program registers the library (``SessionOptions.register_custom_ops_library``) and opens the file. Weights beside
    the given file are used where they lie. If onnxruntime-genai is told of the given file, it is told of the new one in
    another ``genai_config.json``; another folder gets a copy of the tokenizer then.

    Args:
        model: An ONNX file made by this compiler.
        out: The ``.onnx`` file to write; the library has its name, with the suffix ``.so``.
        march: Processor the library is for, as the compiler names it: ``x86-64-v4``, say.
        force: Replace existing files.

    Returns:
        The library's path.

    Raises:
        LoadError: The file is missing or damaged.
        RefusedError: No attention of the file is what the kernel computes, or it uses the kernel already.
        UsageError: There is no compiler, it fails, or the files cannot be written there.
    """
    check_onnx_suffix(out)
    library = out.with_suffix(".so")
    for path in (out, library):
        check_place(path, force)
    require_file(model)
    if out.exists() and out.samefile(model):  # whose weights may lie in a file of their own, which would go
        raise UsageError(f"'{out}' is the file that is to be read.", "Choose another name.")
    if is_fused(model):
        raise RefusedError(f"'{model}' was written by mla-compile fuse already.", "Give the file that it was made of.")
    try:
        fused = fused_model(model)
    except Exception as error:  # protobuf's own, and onnx's
        raise _no_file(model) from error
    if fused is None:
        raise RefusedError(
            f"'{model}' has no attention that the fused kernel computes: {FUSED_CACHES}.",
            "Run the file as it is.",
        )
    outside = any(uses_external_data(tensor) for tensor in fused.graph.initializer)
    if outside and out.absolute().parent != model.absolute().parent:
        raise UsageError(f"The weights of '{model}' lie beside it.", f"Write to the same folder: {model.parent}.")
    config, assets = genai_config_of(model), Assets()
    if config is not None:
        assets = assets_beside(model, out, force, told=True)
    with moved_into(out.parent) as folder:
        onnx.save(fused, folder / out.name)
        compile_library(folder / library.name, f"-march={march}")
        if config is not None:
            copy_assets(assets, folder)
            write_config(with_file(config, out, library), folder)
    return library


def _no_file(model: Path) -> LoadError:
    return LoadError(f"'{model}' is no ONNX file, or a damaged one.", "Give a file made by mla-compile.")
