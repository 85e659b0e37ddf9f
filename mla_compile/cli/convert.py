"""``convert``: a model becomes a smaller one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from mla_compile.cli.groups import EngineOptions, FileOptions, MethodOptions, SizeOptions, SourceOptions, grouped
from mla_compile.cli.options import (
    CHECKS,
    METHOD,
    OUTPUT,
    SHARD_SIZE,
    AsJson,
    Force,
    Format,
    Jobs,
    Model,
    Offload,
    PolishSteps,
    Preset,
    QRank,
    Quiet,
    Seed,
    Selection,
    ShardSize,
    Target,
    TrainTokens,
    Verbose,
    require_no_shards,
)
from mla_compile.errors import UsageError

__all__ = ["convert"]


@grouped
def convert(
    *,
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            help="A .onnx file, a folder for the PyTorch module, a .plan file for a TensorRT engine, or a .gguf file "
            "for llama.cpp.",
            rich_help_panel=OUTPUT,
        ),
    ],
    sizes: SizeOptions,
    how: MethodOptions,
    selection: Selection = "auto",
    polish_steps: PolishSteps = 0,
    source: SourceOptions,
    offload: Offload = None,
    jobs: Jobs = 1,
    form: FileOptions,
    format: Format = "auto",
    preset: Preset = "none",
    q_rank: QRank = None,
    shard_size: ShardSize = SHARD_SIZE,
    target: Target = "auto",
    force: Force = False,
    for_engine: EngineOptions,
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(help="Fail (exit 4) if perplexity grows by more than this factor.", rich_help_panel=CHECKS),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the checks against the original.", rich_help_panel=CHECKS)
    ] = False,
    finetune: Annotated[
        str | None,
        typer.Option(
            help="Text to fine-tune on after converting, to match the original's predictions; the finetune command has "
            "more settings and checkpoints.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    finetune_tokens: TrainTokens = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Convert a model and write it."""
    from mla_compile import display
    from mla_compile.config import make_config

    if format == "auto" and out.suffix == ".gguf":
        format = "gguf"
    if format != "deepseek":
        require_no_shards(shard_size)
    for_tensorrt = _is_for_tensorrt(out, target, format)
    config = make_config(
        **sizes.settings(),
        **how.settings(),
        **form.settings() | ({"cache_layout": "paged"} if target == "cuda" else {}),
        format=format,
        preset=preset,
        q_rank=q_rank,
        selection=selection,
        polish_steps=polish_steps,
        seed=seed,
    )
    with display.make_display(quiet, as_json, verbose) as shown, contextlib.ExitStack() as kept:
        from mla_compile import api
        from mla_compile.conversion.targets import Destination, write
        from mla_compile.disk.layer_store import store_beside
        from mla_compile.reporting.encoder_report import EncoderReport
        from mla_compile.reporting.seq2seq_report import Seq2SeqReport

        if not for_tensorrt and for_engine.given:
            raise UsageError(
                f"{', '.join(for_engine.given)}: only an engine of TensorRT is built for that, and none is written.",
                "Add --target tensorrt, or leave it out; what an ONNX file is run with is said when it is run.",
            )
        engine = for_engine.settings() if for_tensorrt else None
        compiled = api.compile(
            model,
            **source.arguments(),
            config=config,
            offload=offload,
            jobs=jobs,
            share=True,
            check=not no_verify,
            max_perplexity_ratio=max_ppl_ratio,
            out=out,
            engine=engine,
            force=force,
            finetune=finetune,
            finetune_tokens=finetune_tokens,
            store=kept.enter_context(store_beside(out)),
            display=shown,
        )
        report = write(compiled, Destination(out, format, engine, int(shard_size * 1e9), force), shown)
    if as_json:
        display.say(report.to_json(), end="")
    elif isinstance(report, EncoderReport):
        display.show_encoder_report(report, out)
    elif isinstance(report, Seq2SeqReport):
        display.show_seq2seq_report(report, out)
    else:
        display.show_report(report, out)
        if engine is not None:
            from mla_compile.artifacts.tensorrt import commands

            display.show_commands(*commands(out.with_suffix(".onnx"), engine))


def _is_for_tensorrt(out: Path, target: str, format: str) -> bool:
    """Whether TensorRT is what a conversion is for.

    Raises:
        UsageError: The target is unknown, or something else is to be written.
    """
    if target not in ("auto", "cuda", "tensorrt"):
        raise UsageError(f"--target {target} is not one of auto, cuda, tensorrt.", "Give one of them.")
    if target == "cuda" and out.suffix != ".onnx":
        raise UsageError(f"--target cuda is an ONNX file, and '{out}' is none.", "Name a .onnx file.")
    wanted = target == "tensorrt" or out.suffix == ".plan"
    if wanted and format != "auto":
        raise UsageError(f"The format {format} is not for TensorRT.", "Leave --format or --target out.")
    return wanted
