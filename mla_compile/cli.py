"""The command line: parse, call, render, exit code. Nothing here computes, and nothing here imports torch at start."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_compile.errors import MlaCompileError

if TYPE_CHECKING:
    from mla_compile.report import Report

__all__ = ["main"]

app = typer.Typer(
    name="mla-compile",
    help="Make a trained transformer's KV cache small: rewrite its attention to latent attention, export to ONNX.\n\n"
    "'mla-compile MODEL --out FILE.onnx' is short for 'mla-compile convert MODEL --out FILE.onnx'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

_SIZE, _METHOD, _TEXT, _OUTPUT, _CHECKS = "Size", "Method", "Text", "Output", "Checks"


def _known_implementation(value: str) -> str:
    if value not in ("auto", "sdpa", "eager"):
        raise typer.BadParameter(f"'{value}' is not one of auto, sdpa, eager")
    return value


Model = Annotated[str, typer.Argument(help="A torch.export archive (.pt2, .pt), a Hugging Face folder, or a hub id.")]
CacheRatio = Annotated[
    float | None,
    typer.Option(help="Cache size after over before, at most.", show_default="0.3125", rich_help_panel=_SIZE),
]
KvRank = Annotated[int | None, typer.Option(help="Latent rank per layer, instead of a ratio.", rich_help_panel=_SIZE)]
Exact = Annotated[
    bool, typer.Option("--exact", help="Leave nothing out: the result must equal the original.", rich_help_panel=_SIZE)
]
RopeDims = Annotated[
    int | None,
    typer.Option(
        help="Rotating channels kept: of the one rope key of all heads, or of every key/value head in mha2mla.",
        show_default="chosen; an eighth of the head in mha2mla",
        rich_help_panel=_METHOD,
    ),
]
Selection = Annotated[
    str,
    typer.Option(
        help="Which rotary components keep rotating in mha2mla: high, low, uniform, 2-norm; auto is 2-norm with "
        "calibration text, else uniform.",
        rich_help_panel=_METHOD,
    ),
]
Svd = Annotated[
    str,
    typer.Option(
        help="Factorise keys and values in one latent (joint) or two halves (split), in mha2mla.",
        rich_help_panel=_METHOD,
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        help="How sizes and weights are chosen: fisher or transmla by what the model does on text, mha2mla by its "
        "weights; auto is mha2mla with a setting of its own (selection, svd, encoders), else fisher.",
        rich_help_panel=_METHOD,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to choose by and to measure on: a .txt (documents separated by <|endoftext|>) or .jsonl file, or a "
        "dataset hf:NAME[:CONFIG][:SPLIT] (split train by default).",
        rich_help_panel=_TEXT,
    ),
]
CalibrationTokens = Annotated[
    int, typer.Option(help="Tokens of it to calibrate on, from its beginning.", rich_help_panel=_TEXT)
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens per window.", show_default="the model's limit, at most 512", rich_help_panel=_TEXT
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or id of the tokenizer, if the model has none.", rich_help_panel=_TEXT)
]
NoGradients = Annotated[
    bool,
    typer.Option(
        "--no-gradients",
        help="Never run the model backward: less memory and time, and a little worse (fisher).",
        rich_help_panel=_METHOD,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Neither reuse nor save what is measured on the text (in $MLA_COMPILE_CACHE, else ~/.cache/mla-compile).",
        rich_help_panel=_TEXT,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of random ids and samples.", rich_help_panel=_CHECKS)]
AttnImplementation = Annotated[
    str,
    typer.Option(
        help="How a transformers model spells its attention: sdpa, eager, or auto for the first it has.",
        callback=_known_implementation,
    ),
]
UnsafeLoad = Annotated[
    bool, typer.Option("--unsafe-load", help="Unpickle a module from a file; this runs the code in it.")
]
Encoders = Annotated[
    bool,
    typer.Option(
        "--encoders",
        help="Convert encoders too, whose projections become low-rank for want of a cache, and the decoder of an "
        "encoder-decoder.",
        rich_help_panel=_METHOD,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mla-compile {version('mla-compile')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Nothing is done before a command."""


@app.command()
def convert(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="A .onnx file, or a folder for the PyTorch module.", rich_help_panel=_OUTPUT)
    ],
    cache_ratio: CacheRatio = None,
    kv_rank: KvRank = None,
    exact: Exact = False,
    encoders: Encoders = False,
    method: MethodName = "auto",
    selection: Selection = "auto",
    rope_dims: RopeDims = None,
    svd: Svd = "joint",
    no_gradients: NoGradients = False,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 65536,
    seq_len: SeqLen = None,
    no_cache: NoCache = False,
    tokenizer: Tokenizer = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set: 23 or 24.", rich_help_panel=_OUTPUT)] = 23,
    inline: Annotated[
        bool,
        typer.Option("--inline", help="Standard operators only, no LatentAttention nodes.", rich_help_panel=_OUTPUT),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)] = False,
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(help="Fail (exit 4) if perplexity grows by more than this factor.", rich_help_panel=_CHECKS),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the checks against the original.", rich_help_panel=_CHECKS)
    ] = False,
    seed: Seed = 0,
    attn_implementation: AttnImplementation = "auto",
    unsafe_load: UnsafeLoad = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model and write it."""
    from mla_compile import display
    from mla_compile.config import make_config

    config = make_config(
        method=method,
        selection=selection,
        rope_dims=rope_dims,
        svd=svd,
        gradients=not no_gradients,
        cache_ratio=cache_ratio,
        kv_rank=kv_rank,
        exact=exact,
        calibration_tokens=calibration_tokens,
        seq_len=seq_len,
        seed=seed,
        opset=opset,
        inline=inline,
        encoders=encoders,
    )
    shown = display.make_display(quiet or as_json)
    with shown:
        from mla_compile import api
        from mla_compile.encoder_report import EncoderReport
        from mla_compile.seq2seq_report import Seq2SeqReport

        compiled = api.compile(
            model,
            calibration=calibration,
            tokenizer=tokenizer,
            config=config,
            statistics_cache=not no_cache,
            check=not no_verify,
            max_perplexity_ratio=max_ppl_ratio,
            out=out,
            force=force,
            attn_implementation=attn_implementation,
            unsafe_load=unsafe_load,
            display=shown,
        )
        if out.suffix == ".onnx":
            report: Report | EncoderReport | Seq2SeqReport = compiled.to_onnx(out, force=force, display=shown)
        else:
            report = compiled.save(out, force=force)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    elif isinstance(report, EncoderReport):
        display.show_encoder_report(report, out)
    elif isinstance(report, Seq2SeqReport):
        display.show_seq2seq_report(report, out)
    else:
        display.show_report(report, out)


@app.command()
def inspect(
    model: Model,
    encoders: Encoders = False,
    attn_implementation: AttnImplementation = "auto",
    unsafe_load: UnsafeLoad = False,
    as_json: AsJson = False,
) -> None:
    """Show every attention layer: what was recognised, or why it cannot be converted."""
    from mla_compile import api, display
    from mla_compile.report import summarise_site

    program, found = api.inspect(model, attn_implementation=attn_implementation, unsafe_load=unsafe_load)
    sites, rejections = api.convertible(program, found, encoders)
    lossless = api.lossless_elements(program, sites)
    rows = [summarise_site(s) | {"lossless_elements_per_token": n} for s, n in zip(sites, lossless, strict=True)]
    rows += map(summarise_site, rejections)
    rows.sort(key=lambda row: int(row["index"]))
    if as_json:
        typer.echo(json.dumps({"model": model, "layers": rows}, indent=2))
    else:
        display.show_layers(rows)
    if api.would_be_refused(program, found, encoders):
        raise typer.Exit(3)


@app.command()
def plan(
    model: Model,
    cache_ratio: CacheRatio = None,
    kv_rank: KvRank = None,
    exact: Exact = False,
    rope_dims: RopeDims = None,
    method: MethodName = "auto",
    svd: Svd = "joint",
    no_gradients: NoGradients = False,
    encoders: Encoders = False,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 65536,
    seq_len: SeqLen = None,
    no_cache: NoCache = False,
    tokenizer: Tokenizer = None,
    attn_implementation: AttnImplementation = "auto",
    unsafe_load: UnsafeLoad = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show ranks, rotating channels and cache bytes per token without writing anything."""
    from mla_compile import display
    from mla_compile.config import make_config

    config = make_config(
        method=method,
        cache_ratio=cache_ratio,
        kv_rank=kv_rank,
        exact=exact,
        rope_dims=rope_dims,
        svd=svd,
        gradients=not no_gradients,
        encoders=encoders,
        calibration_tokens=calibration_tokens,
        seq_len=seq_len,
    )
    shown = display.make_display(quiet or as_json)
    with shown:
        from mla_compile import api

        found, plans = api.plan(
            model,
            config,
            calibration=calibration,
            tokenizer=tokenizer,
            statistics_cache=not no_cache,
            attn_implementation=attn_implementation,
            unsafe_load=unsafe_load,
            display=shown,
        )
    if as_json:
        typer.echo(json.dumps(display.plan_rows(plans), indent=2))
    else:
        display.show_plan(plans, cached=bool(found.sites))


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="An ONNX file made by mla-compile.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give it several times for a batch.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k most likely; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose among the fewest tokens of this mass.")] = 1.0,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per operator.")] = None,
    as_json: AsJson = False,
) -> None:
    """Generate text with a converted model in ONNX Runtime."""
    from mla_compile import display
    from mla_compile.runtime.generate import Sampling
    from mla_compile.textgen import generate_text

    streamed = len(prompt) == 1 and not as_json
    result = generate_text(
        model,
        prompt,
        max_new_tokens,
        Sampling(temperature, top_k, top_p, seed),
        tokenizer=tokenizer,
        threads=threads,
        on_text=display.stream_text if streamed else None,
    )
    if as_json:
        typer.echo(json.dumps(display.generation_row(result)))
    else:
        display.show_generation(result, streamed)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="An ONNX file made by mla-compile, or any model 'convert' takes.")],
    text: Annotated[Path, typer.Option(help=".txt (documents separated by <|endoftext|>) or .jsonl.")],
    original: Annotated[str | None, typer.Option(help="The unconverted model, measured beside it.")] = None,
    seq_len: SeqLen = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Measure on at most this many tokens.")] = None,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity and cache size on a text."""
    from mla_compile import display, measure

    shown = display.make_display(quiet or as_json)
    with shown:
        result = measure.measure(
            model, text, original=original, seq_len=seq_len, max_tokens=max_tokens, tokenizer=tokenizer, display=shown
        )
    if as_json:
        typer.echo(json.dumps(result))
    else:
        display.show_measurement(result)


_COMMANDS = frozenset({"convert", "inspect", "plan", "run", "eval"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; ``sys.argv`` by default.

    Returns:
        The exit code: 0 done, 1 our defect, 2 usage, 3 refused, 4 quality gate, 5 verification, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in _COMMANDS and words[0] not in ("--help", "--version"):
        words.insert(0, "convert")  # the default verb
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        code = app(args=words or ["--help"], prog_name="mla-compile", standalone_mode=False)
    except MlaCompileError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted.", 130)
    except OSError as error:
        return _fail(f"A file could not be written ({error}). Free some space or choose another folder.", 2)
    except Exception as error:
        if not hasattr(error, "format_message"):  # anything but the parser's own
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "mla-compile"
        sentence = " ".join(error.format_message().split()).rstrip(".")
        return _fail(f"{sentence}. See '{command} --help'.", 2)
    if code == 130:  # the parser turns an interrupt into this code
        return _fail("Interrupted.", 130)
    return 2 if not words else code or 0


def _fail(sentence: str, code: int) -> int:
    typer.echo(f"mla-compile: {sentence}", err=True)
    return code
