"""``tensorrt`` and ``build-plugin``: files, engines and plugins for TensorRT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mla_compile.cli.groups import EngineOptions, grouped
from mla_compile.cli.options import (
    OUTPUT,
    TENSORRT,
    AsJson,
    Force,
    Quiet,
    Verbose,
    one_of,
)
from mla_compile.errors import UsageError

__all__ = ["build_plugin", "tensorrt"]


@grouped
def tensorrt(
    *,
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder written by 'mla-compile convert MODEL --out FOLDER' or, for an engine, a file written by "
            "this command, perhaps on another machine."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .onnx or .plan file to write.", rich_help_panel=OUTPUT)],
    plugin: Annotated[
        str,
        typer.Option(
            help="Plugins for the file's nodes: quick (those that this command's engines use), or cpp (a library made "
            "by 'build-plugin', which splits caches itself).",
            callback=one_of("quick", "cpp"),
            rich_help_panel=TENSORRT,
        ),
    ] = "quick",
    for_engine: EngineOptions,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write a converted model for TensorRT, with fixed caches and nodes for plugins, or build an engine."""
    from mla_compile import display
    from mla_compile.artifacts.tensorrt import commands, write_for_tensorrt
    from mla_compile.progress import Stages

    if plugin == "cpp" and out.suffix == ".plan":
        raise UsageError(
            "Engines of this command have quick plugins.", "Name a .onnx file, and build its engine with trtexec."
        )
    if plugin == "cpp" and "--splits" in for_engine.given:
        raise UsageError("Plugins of --plugin cpp choose splits themselves.", "Leave --splits or --plugin out.")
    settings = for_engine.settings()
    if plugin == "cpp":
        settings = dataclasses.replace(settings, splits=None)
    with display.make_display(quiet, as_json, verbose) as shown:
        written = write_for_tensorrt(source, out, settings, force=force, stages=Stages(shown))
    build, look = commands(written.onnx, settings)
    if as_json:
        display.print_json(display.written_row(written, build, look))
        return
    display.show_written(written)
    display.show_commands(build, look)
    if plugin == "cpp":
        library = out.with_name("libmla_plugin.so")
        build, _ = commands(written.onnx, settings, library)
        display.show_library_commands(written.onnx, library, build)


def build_plugin(
    files: Annotated[
        list[Path], typer.Argument(help="One or more ONNX files written by 'mla-compile tensorrt --plugin cpp'.")
    ],
    tensorrt_include: Annotated[Path, typer.Option(help="Folder of TensorRT's headers, 10.3 or later.")],
    out: Annotated[Path, typer.Option(help="The .so file to write.", rich_help_panel=OUTPUT)],
    cuda_include: Annotated[
        Path | None, typer.Option(help="Folder of CUDA's headers.", show_default="Triton's own")
    ] = None,
    architecture: Annotated[
        list[int] | None,
        typer.Option(
            help="A compute capability, such as 90 for 9.0; repeat the option for more.", show_default="all known"
        ),
    ] = None,
    self_registering: Annotated[
        bool,
        typer.Option(
            "--self-registering", help="Register the plugins on load, as ONNX Runtime's TensorRT provider expects."
        ),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Compile the TensorRT plugins of ONNX files to a library, for trtexec and ONNX Runtime."""
    from mla_compile import display
    from mla_compile.artifacts.plugin_library import build_plugin_library

    with display.make_display(quiet, as_json, verbose) as shown:
        build_plugin_library(
            files,
            out,
            tensorrt_include=tensorrt_include,
            cuda_include=cuda_include,
            architectures=architecture or (),
            self_registering=self_registering,
            force=force,
            display=shown,
        )
    if as_json:
        display.print_json({"library": str(out), "self_registering": self_registering})
    else:
        display.show_library(out, self_registering)
