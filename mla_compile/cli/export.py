"""``export``, ``verify`` and ``report``: what was converted, in another form, checked, or drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mla_compile.cli.groups import FileOptions, grouped
from mla_compile.cli.options import (
    OUTPUT,
    AsJson,
    Force,
    Quiet,
    Verbose,
)
from mla_compile.errors import UsageError

__all__ = ["export", "fuse", "report", "verify"]


@grouped
def export(
    *,
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder written by 'convert' or 'finetune'; for .gguf, one written with --format deepseek."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .onnx or .gguf file to write.", rich_help_panel=OUTPUT)],
    form: FileOptions,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write a saved model as ONNX, checked in ONNX Runtime, or a DeepSeek checkpoint as GGUF, checked in llama.cpp."""
    from mla_compile import display
    from mla_compile.artifacts.saved import open_saved, write_saved_onnx
    from mla_compile.config import make_config

    if out.suffix == ".gguf":
        from mla_compile.artifacts.gguf_file import export_gguf

        if form not in (FileOptions(), FileOptions(cache_type="float32")):
            raise UsageError("Options of ONNX files were given for a GGUF file.", "Leave them out.")
        with display.make_display(quiet, as_json, verbose):
            error = export_gguf(folder, out, force=force)
        if as_json:
            display.print_json({"llama_cpp_error": error}, one_line=True)
        else:
            display.show_gguf(out, error)
        return

    # Others are refused before anything is read.
    config = make_config(**form.settings())
    with display.make_display(quiet, as_json, verbose):
        report = write_saved_onnx(open_saved(folder), out, config, force=force)
    if as_json:
        display.print_json(report)
    else:
        display.show_exported(report, out)


def fuse(
    model: Annotated[Path, typer.Argument(help="An ONNX file made by mla-compile.")],
    out: Annotated[
        Path,
        typer.Option(help="The .onnx file to write; the library goes beside it, as a .so.", rich_help_panel=OUTPUT),
    ],
    march: Annotated[str, typer.Option(help="Processor to compile the library for, as compilers name it.")] = "native",
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write a file that uses the fused attention kernel, and its library, for ONNX Runtime without mla-compile."""
    from mla_compile import display
    from mla_compile.artifacts.fuse import write_fused

    with display.make_display(quiet, as_json, verbose):
        library = write_fused(model, out, march=march, force=force)
    if as_json:
        display.print_json({"onnx": str(out), "library": str(library)})
    else:
        display.say(f"wrote {out} and {library}")


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A folder written with --format deepseek, or a .gguf file.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Check a DeepSeek checkpoint in stock transformers, or llama.cpp, against the converted module's outputs."""
    from mla_compile import display
    from mla_compile.artifacts.checkpoint_folder import verify_folder
    from mla_compile.artifacts.gguf_check import verify_gguf

    found: dict[str, float | None]
    with display.make_display(quiet, as_json, verbose):
        if checkpoint.suffix == ".gguf":
            error, greedy = verify_gguf(checkpoint)
            found = {"error": error, "greedy": greedy}
        else:
            found = dataclasses.asdict(verify_folder(checkpoint))
    if as_json:
        display.print_json(found, one_line=True)
    else:
        display.show_check(checkpoint, found)


def report(
    source: Annotated[Path, typer.Argument(help="A report.json, or the folder that holds it.")],
    measurement: Annotated[
        Path | None,
        typer.Option(
            "--eval", help="Output of 'eval ... --original MODEL --json', to plot quality against cache kept."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The .html file to write.", show_default="report.html beside it", rich_help_panel=OUTPUT),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Draw the report of a conversion as one page again (every conversion writes one)."""
    from mla_compile import display
    from mla_compile.artifacts.page_file import write_page
    from mla_compile.reporting.report_page import PAGE

    page = out or (source if source.is_dir() else source.parent) / PAGE
    with display.make_display(quiet, as_json, verbose):
        write_page(source, page, measurement, force)
    if as_json:
        display.print_json({"page": str(page)})
    else:
        display.say(str(page))
