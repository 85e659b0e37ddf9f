"""``export``, ``fuse``, ``quantize``, ``verify``, ``report``: what was converted, in another form, checked, drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mla_compile.cli.groups import FileOptions, grouped
from mla_compile.cli.options import (
    OUTPUT,
    SHARD_SIZE,
    AsJson,
    Force,
    Preset,
    Quiet,
    ShardSize,
    Verbose,
    one_of,
    require_no_shards,
)
from mla_compile.errors import UsageError

if TYPE_CHECKING:
    from mla_compile.config import CompileConfig

__all__ = ["export", "fuse", "quantize", "report", "verify"]


@grouped
def export(
    *,
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder written by 'convert' or 'finetune'; for .gguf, also one written with --format deepseek."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The .onnx or .gguf file to write, or with --format deepseek a folder.", rich_help_panel=OUTPUT
        ),
    ],
    form: FileOptions,
    format: Annotated[
        str,
        typer.Option(
            help="auto follows the name of --out; deepseek is a folder that stock transformers loads as "
            "DeepSeek-V3; it and gguf take a model that was converted with --layout deepseek.",
            rich_help_panel=OUTPUT,
            callback=one_of("auto", "deepseek", "gguf"),
        ),
    ] = "auto",
    preset: Preset = "none",
    shard_size: ShardSize = SHARD_SIZE,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write a saved model as ONNX, as a DeepSeek checkpoint or as GGUF, and check it where it is to run."""
    from mla_compile import display
    from mla_compile.artifacts.companions import is_converted_folder
    from mla_compile.artifacts.gguf_file import export_gguf
    from mla_compile.artifacts.saved import open_saved, write_saved_onnx
    from mla_compile.artifacts.saved_checkpoint import write_saved_checkpoint, write_saved_gguf
    from mla_compile.config import make_config
    from mla_compile.progress import Stages

    if format == "auto" and out.suffix == ".gguf":
        format = "gguf"
    # Others are refused before anything is read.
    config = make_config(**form.settings(), format=format, preset=preset)
    _require_fitting(config, form, shard_size)
    report: Mapping[str, Any] | None = None
    with display.make_display(quiet, as_json, verbose) as shown:
        stages = Stages(shown)
        if format == "gguf" and not is_converted_folder(folder):
            if preset != "none":
                raise UsageError(f"'{folder}' is a checkpoint already, whose sizes are fixed.", "Leave --preset out.")
            error = export_gguf(folder, out, force=force, stages=stages)
        elif format == "gguf":
            report = write_saved_gguf(open_saved(folder), out, preset=preset, force=force, stages=stages)
            error = report["checkpoint"]["llama_cpp_error"]
        elif format == "deepseek":
            shard = int(shard_size * 1e9)
            report = write_saved_checkpoint(
                open_saved(folder), out, preset=preset, shard=shard, force=force, stages=stages
            )
        else:
            report = write_saved_onnx(open_saved(folder), out, config, force=force)
    if as_json:
        display.print_json({"llama_cpp_error": error} if report is None else report, one_line=report is None)
    elif report is None or format == "gguf":
        display.show_gguf(out, error)
    elif format == "deepseek":
        display.show_checkpoint(report, out)
    else:
        display.show_exported(report, out)


def _require_fitting(config: CompileConfig, form: FileOptions, shard_size: float) -> None:
    """Refuse options of something else than what is written.

    Raises:
        UsageError: There are some.
    """
    if config.for_stock_code and form not in (FileOptions(), FileOptions(cache_type="float32")):
        raise UsageError(
            f"Options of ONNX files were given for a {'GGUF file' if config.format == 'gguf' else 'checkpoint'}.",
            "Leave them out.",
        )
    if config.format != "deepseek":
        require_no_shards(shard_size)


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


def quantize(
    model: Annotated[Path, typer.Argument(help="An ONNX file made by mla-compile.")],
    out: Annotated[Path, typer.Option(help="The .onnx file to write.", rich_help_panel=OUTPUT)],
    weights: Annotated[
        str,
        typer.Option(
            help="Type of the weights of products: int8, or int4, where what makes logits stays int8.",
            callback=one_of("int8", "int4"),
        ),
    ] = "int8",
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Write an ONNX file with weights of eight or four bits, and say how far its logits are from those of the first."""
    from mla_compile import display
    from mla_compile.artifacts.quantised_file import write_quantised
    from mla_compile.passes.quantise_weights import WeightType
    from mla_compile.progress import Stages

    with display.make_display(quiet, as_json, verbose) as shown:
        found = write_quantised(model, out, cast(WeightType, weights), force=force, stages=Stages(shown))
    if as_json:
        display.print_json({"onnx": str(out), "weights": weights, **dataclasses.asdict(found)})
    else:
        display.show_quantised(out, weights, found)


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

    beside = source / PAGE if source.is_dir() else source.with_name(PAGE)
    if source.name.endswith(".report.json"):  # of a file whose report another's took the place of
        beside = source.with_suffix(".html")
    page = out or beside
    with display.make_display(quiet, as_json, verbose):
        write_page(source, page, measurement, force)
    if as_json:
        display.print_json({"page": str(page)})
    else:
        display.say(str(page))
