"""``eval`` and ``bench``: quality and speed beside the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mla_compile.cli.options import (
    CALIBRATION_TOKENS,
    OUTPUT,
    TRIALS,
    AsJson,
    ForcePlot,
    NoCache,
    Quiet,
    SeqLen,
    Tokenizer,
    Verbose,
)
from mla_compile.errors import UsageError

__all__ = ["bench_speed", "evaluate"]


def evaluate(
    model: Annotated[
        list[str],
        typer.Argument(
            help="One or more ONNX files or folders made by mla-compile, or any models that 'convert' takes."
        ),
    ],
    text: Annotated[
        Path, typer.Option(help="Text to measure on: .txt (documents separated by <|endoftext|>) or .jsonl.")
    ],
    original: Annotated[str | None, typer.Option(help="The unconverted model to compare with.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Convert MODEL with these methods, such as fisher,transmla,mha2mla, without writing anything.",
            rich_help_panel=TRIALS,
        ),
    ] = None,
    cache_ratios: Annotated[
        str | None,
        typer.Option(
            help="Cache ratios to try with every method.",
            show_default="0.5,0.3125,0.25",
            rich_help_panel=TRIALS,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Calibration text, as for convert; not the same as --text.", rich_help_panel=TRIALS),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, help="Calibration tokens to use.", rich_help_panel=TRIALS)
    ] = CALIBRATION_TOKENS,
    onnxruntime: Annotated[
        bool,
        typer.Option("--onnxruntime", help="Measure each conversion in ONNX Runtime too.", rich_help_panel=TRIALS),
    ] = False,
    no_cache: NoCache = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device on which models in PyTorch run, and conversions are computed, such as cuda.",
            show_default="cpu",
        ),
    ] = None,
    seq_len: SeqLen = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Measure on at most this many tokens.")] = None,
    tokenizer: Tokenizer = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot perplexity ratio against cache kept, to a .svg or .png file.", rich_help_panel=OUTPUT),
    ] = None,
    force: ForcePlot = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure quality and cache size on a text, of models or of trial conversions."""
    from mla_compile import display

    given = {
        "--cache-ratios": cache_ratios is not None,
        "--calibration": calibration is not None,
        "--calibration-tokens": calibration_tokens != CALIBRATION_TOKENS,
        "--onnxruntime": onnxruntime,
        "--no-cache": no_cache,
    }
    _check_eval(model, original, methods, [flag for flag, there in given.items() if there], plot)
    if plot is not None:
        from mla_compile.evaluation.plot import check_plot

        check_plot(plot, force)
    with display.make_display(quiet, as_json, verbose) as shown:
        from mla_compile.disk.statistics_cache import open_cache
        from mla_compile.evaluation.measure import Sample, measure
        from mla_compile.evaluation.trial import measure_conversions, read_trials

        sample = Sample(text, seq_len, max_tokens, tokenizer)
        if methods is None:
            result = measure(model, sample, original=original, device=device or "cpu", display=shown)
        else:
            ratios = "0.5,0.3125,0.25" if cache_ratios is None else cache_ratios
            trials = read_trials(methods, ratios, calibration is not None, calibration_tokens)
            result = measure_conversions(
                model[0],
                sample,
                trials,
                calibration=calibration,
                onnxruntime=onnxruntime,
                cache=open_cache(not no_cache),
                device=device or "cpu",
                display=shown,
            )
    if plot is not None:
        from mla_compile.evaluation.plot import draw

        draw(result, plot)
    if as_json:
        display.print_json(result.to_dict(), one_line=True)
    else:
        display.show_measurement(result)


def _check_eval(
    model: list[str],
    original: str | None,
    methods: str | None,
    of_conversions: list[str],
    plot: Path | None,
) -> None:
    """Refuse options of 'eval' that do not go together; of those about conversions the ones given are named.

    Raises:
        UsageError: They do not.
    """
    if methods is None and of_conversions:
        raise UsageError(
            f"{of_conversions[0]} is about conversions made on the spot, and no --methods were given.",
            "Add --methods fisher,transmla,mha2mla.",
        )
    if methods is not None and (original is not None or len(model) > 1):
        raise UsageError(
            "--methods converts one model, which is the original itself.", "Give that MODEL alone, without --original."
        )
    if methods is None and original is None and plot is not None:
        raise UsageError("A plot shows models beside their original, and none was given.", "Add --original MODEL.")


def bench_speed(
    model: Annotated[list[Path], typer.Argument(help="ONNX files made by mla-compile from one original.")],
    against: Annotated[
        str,
        typer.Option(
            help="The original: any MODEL, or 'original' for the one that report.json beside the first file names."
        ),
    ] = "original",
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Tokens in the cache, such as 512,4096.", show_default="512,4096; the model's limit if lower"
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of every file.")] = 15,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads per operator.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Plot speed against context, to a .svg or .png file.", rich_help_panel=OUTPUT)
    ] = None,
    force: ForcePlot = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Measure speed and memory beside the original's fastest forms in ONNX Runtime, on the CPU."""
    from mla_compile import display

    if plot is not None:
        from mla_compile.evaluation.plot import check_plot

        check_plot(plot, force)
    sizes = _numbers("--contexts", contexts, 2) if contexts is not None else None
    many = _numbers("--batches", batches, 1)
    with display.make_display(quiet, as_json, verbose) as shown:
        from mla_compile.evaluation.bench import bench
        from mla_compile.evaluation.benchmark import Workload

        result = bench(model, against, Workload(sizes, many, rounds, threads), display=shown)
    if plot is not None:
        from mla_compile.evaluation.plot import speed_figure, write_figure

        write_figure(lambda: speed_figure(result), plot)
    if as_json:
        display.print_json(result.to_dict())
    else:
        display.show_benchmark(result)


def _numbers(flag: str, text: str, least: int) -> tuple[int, ...]:
    """Read numbers with commas between them, in order.

    Raises:
        UsageError: One is none, or too small.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise UsageError(f"{flag} {text} is no list of numbers from {least} on.", "Put commas between them: 512,4096.")
    return tuple(sorted({int(part) for part in parts}))
