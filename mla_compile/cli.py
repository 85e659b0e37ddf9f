"""The command line: parse, call, render, exit code. Nothing here computes, and nothing here imports torch at start."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mla_compile.errors import MlaCompileError, ShareDone, UsageError

if TYPE_CHECKING:
    from mla_compile.report import Report

__all__ = ["main"]

app = typer.Typer(
    name="mla-compile",
    help="Make a trained transformer's KV cache small: rewrite its attention to latent attention, export to ONNX.\n\n"
    "'mla-compile MODEL --out FILE.onnx' is short for 'mla-compile convert MODEL --out FILE.onnx'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_SIZE, _METHOD, _TEXT, _OUTPUT, _CHECKS = "Size", "Method", "Text", "Output", "Checks"
_TRIALS, _TENSORRT = "Conversions on the spot", "TensorRT"
_TOWARDS, _PACE = "What is trained towards what", "Pace"


def _known_implementation(value: str) -> str:
    if value not in ("auto", "sdpa", "eager"):
        raise typer.BadParameter(f"'{value}' is not one of auto, sdpa, eager")
    return value


def _known_provider(value: str | None) -> str | None:
    if value not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"'{value}' is not one of cpu, cuda")
    return value


def _known_kernel(value: str | None) -> str | None:
    if value not in (None, "auto", "fused", "standard"):
        raise typer.BadParameter(f"'{value}' is not one of auto, fused, standard")
    return value


def _known_plugin(value: str) -> str:
    if value not in ("quick", "cpp"):
        raise typer.BadParameter(f"'{value}' is not one of quick, cpp")
    return value


Model = Annotated[str, typer.Argument(help="A torch.export archive (.pt2, .pt), a Hugging Face folder, or a hub id.")]
Described = Annotated[
    str,
    typer.Argument(
        help="A torch.export archive (.pt2, .pt), a Hugging Face folder, or a hub id; a config.json, or a folder "
        "without weights, is enough."
    ),
]
CacheRatio = Annotated[
    float | None,
    typer.Option(help="Cache size after over before, at most.", show_default="0.3125", rich_help_panel=_SIZE),
]
KvRank = Annotated[int | None, typer.Option(help="Latent rank per layer, instead of a ratio.", rich_help_panel=_SIZE)]
UniformRank = Annotated[
    bool,
    typer.Option(
        "--uniform-rank",
        help="The same rank in all layers, where ranks follow from a ratio: the smallest that any of them would have.",
        rich_help_panel=_SIZE,
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        help="What caches may look like, in fisher and transmla: free, or deepseek for what a stock DeepSeek-V3 "
        "checkpoint can express (one rank, one even table of frequencies with one component each).",
        rich_help_panel=_METHOD,
    ),
]
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
PolishSteps = Annotated[
    int,
    typer.Option(
        help="Train the new matrices for so many steps on the calibration text, to predict what the original does; "
        "100 to 500 help most in small caches.",
        rich_help_panel=_METHOD,
    ),
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
Offload = Annotated[
    Path | None,
    typer.Option(
        help="Folder for activations between layers, where a model is so large that it is run layer by layer.",
        show_default="in memory, in rounds",
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
Format = Annotated[
    str,
    typer.Option(
        help="What to write: auto is what the name of --out says, hf a folder that mla_compile.load reads, deepseek a "
        "folder that stock transformers loads as DeepSeek-V3, gguf a file for llama.cpp (both take --layout deepseek).",
        rich_help_panel=_OUTPUT,
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        help="With --format deepseek: flashmla is 512 latent entries and 64 rotating channels, zeros included.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
QRank = Annotated[
    int | None,
    typer.Option(
        help="With --format deepseek or gguf: numbers that the queries of a token are made from (q_lora_rank).",
        show_default="none: queries are made directly",
        rich_help_panel=_SIZE,
    ),
]
TrainTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens to train on.", show_default="the text once", rich_help_panel=_TEXT)
]
Opset = Annotated[
    int | None,
    typer.Option(
        help="ONNX operator set: 23 or 24.", show_default="23; 24 for a static cache", rich_help_panel=_OUTPUT
    ),
]
CacheKind = Annotated[
    str,
    typer.Option(
        "--cache",
        help="What an ONNX file's caches are: dynamic ones grow with every token, and any program can run them; "
        "static ones are memory of a size that the program gives them, written in place.",
        rich_help_panel=_OUTPUT,
    ),
]
CacheType = Annotated[
    str,
    typer.Option(
        help="What an ONNX file's caches hold: auto for numbers of the type --dtype, or int8 codes with two scales per "
        "token, whose products are of integers; float32 is auto where that is the type.",
        rich_help_panel=_OUTPUT,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of weights and caches: float32, float16 or bfloat16; auto is the model's own.",
        rich_help_panel=_OUTPUT,
    ),
]
CacheLayout = Annotated[
    str,
    typer.Option(
        help="How an ONNX file's caches lie: rows, or genai for onnxruntime-genai, whose configuration is then written "
        "beside the file.",
        rich_help_panel=_OUTPUT,
    ),
]
Inline = Annotated[
    bool, typer.Option("--inline", help="Standard operators only, no LatentAttention nodes.", rich_help_panel=_OUTPUT)
]
Target = Annotated[
    str,
    typer.Option(
        help="What to write for: auto is what the name of --out says (ONNX Runtime for .onnx, TensorRT for .plan), "
        "tensorrt an engine, or with .onnx the file that engines are built of, cuda an ONNX file with the CUDA "
        "provider's own operator for latent attention (experimental).",
        rich_help_panel=_OUTPUT,
    ),
]
MaxBatch = Annotated[int, typer.Option(min=1, help="Sequences at most.", rich_help_panel=_TENSORRT)]
MaxLength = Annotated[
    int,
    typer.Option(
        min=16,
        help="Tokens that every sequence's cache has room for; no more than the model's longest.",
        rich_help_panel=_TENSORRT,
    ),
]
MaxPrompt = Annotated[
    int,
    typer.Option(
        min=1,
        help="New tokens at most that run together; longer prompts come one part after another.",
        rich_help_panel=_TENSORRT,
    ),
]
Splits = Annotated[
    int,
    typer.Option(min=1, max=64, help="Pieces that kernels cut every cache into.", rich_help_panel=_TENSORRT),
]
TimingCache = Annotated[
    Path | None,
    typer.Option(help="File to keep measured times in, for builds to come.", rich_help_panel=_TENSORRT),
]
VersionCompatible = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help="An engine that other versions of TensorRT run too, perhaps more slowly.",
        rich_help_panel=_TENSORRT,
    ),
]
WeightStreaming = Annotated[
    bool,
    typer.Option(
        "--weight-streaming",
        help="An engine whose weights may stay in the host's memory where the GPU's has no room, which is slower.",
        rich_help_panel=_TENSORRT,
    ),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit",
        help="An engine whose weights can be replaced without building it again, perhaps slower.",
        rich_help_panel=_TENSORRT,
    ),
]
NoPlugins = Annotated[
    bool,
    typer.Option("--no-plugins", help="Standard operators only, instead of our kernels.", rich_help_panel=_TENSORRT),
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
        Path,
        typer.Option(
            help="A .onnx file, a folder for the PyTorch module, a .plan file for a TensorRT engine, or a .gguf file "
            "for llama.cpp.",
            rich_help_panel=_OUTPUT,
        ),
    ],
    cache_ratio: CacheRatio = None,
    kv_rank: KvRank = None,
    uniform_rank: UniformRank = False,
    exact: Exact = False,
    encoders: Encoders = False,
    method: MethodName = "auto",
    layout: Layout = "free",
    selection: Selection = "auto",
    rope_dims: RopeDims = None,
    svd: Svd = "joint",
    polish_steps: PolishSteps = 0,
    no_gradients: NoGradients = False,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 65536,
    seq_len: SeqLen = None,
    no_cache: NoCache = False,
    offload: Offload = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    opset: Opset = None,
    cache: CacheKind = "dynamic",
    cache_type: CacheType = "auto",
    cache_layout: CacheLayout = "rows",
    inline: Inline = False,
    format: Format = "auto",
    preset: Preset = "none",
    q_rank: QRank = None,
    shard_size: Annotated[
        float, typer.Option(min=0.001, help="GB per file of weights, with --format deepseek.", rich_help_panel=_OUTPUT)
    ] = 5.0,
    target: Target = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)] = False,
    max_batch: MaxBatch = 8,
    max_length: MaxLength = 4096,
    max_prompt: MaxPrompt = 128,
    splits: Splits = 16,
    timing_cache: TimingCache = None,
    version_compatible: VersionCompatible = False,
    weight_streaming: WeightStreaming = False,
    refit: Refit = False,
    no_plugins: NoPlugins = False,
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(help="Fail (exit 4) if perplexity grows by more than this factor.", rich_help_panel=_CHECKS),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the checks against the original.", rich_help_panel=_CHECKS)
    ] = False,
    finetune: Annotated[
        str | None,
        typer.Option(
            help="Text to fine-tune on after converting, to predict what the original does; the command finetune has "
            "settings and checkpoints.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    finetune_tokens: TrainTokens = None,
    seed: Seed = 0,
    attn_implementation: AttnImplementation = "auto",
    unsafe_load: UnsafeLoad = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model and write it."""
    from mla_compile import display
    from mla_compile.config import make_config

    if finetune is None and finetune_tokens is not None:
        raise UsageError("--finetune-tokens counts tokens of --finetune TEXT, and none was given.", "Add --finetune.")
    if format == "auto" and out.suffix == ".gguf":
        format = "gguf"
    for_tensorrt = _is_for_tensorrt(out, target, format)
    config = make_config(
        method=method,
        layout="deepseek" if format in ("deepseek", "gguf") else layout,
        format=format,
        preset=preset,
        q_rank=q_rank,
        selection=selection,
        rope_dims=rope_dims,
        svd=svd,
        gradients=not no_gradients,
        cache_ratio=cache_ratio,
        kv_rank=kv_rank,
        uniform_rank=uniform_rank,
        exact=exact,
        calibration_tokens=calibration_tokens,
        polish_steps=polish_steps,
        seq_len=seq_len,
        seed=seed,
        opset=opset,
        dtype=dtype,
        cache=cache,
        cache_type=cache_type,
        cache_layout="paged" if target == "cuda" else cache_layout,
        inline=inline,
        encoders=encoders,
    )
    shown = display.make_display(quiet or as_json)
    with shown, contextlib.ExitStack() as kept:
        from mla_compile import api
        from mla_compile.encoder_report import EncoderReport
        from mla_compile.layer_store import store_beside
        from mla_compile.runtime.tensorrt.engine_builder import EngineSettings
        from mla_compile.seq2seq_report import Seq2SeqReport

        engine = EngineSettings(
            max_batch,
            max_length,
            max_prompt,
            splits,
            not no_plugins,
            version_compatible,
            timing_cache,
            weight_streaming=weight_streaming,
            refit=refit,
        )
        if not for_tensorrt and engine != EngineSettings():
            raise UsageError(
                "Options of the panel TensorRT were given, and something else is written.",
                "Add --target tensorrt, or leave them out.",
            )
        compiled = api.compile(
            model,
            calibration=calibration,
            tokenizer=tokenizer,
            config=config,
            statistics_cache=not no_cache,
            offload=offload,
            share=True,
            check=not no_verify,
            max_perplexity_ratio=max_ppl_ratio,
            out=out,
            engine=engine if for_tensorrt else None,
            force=force,
            attn_implementation=attn_implementation,
            unsafe_load=unsafe_load,
            finetune=finetune,
            finetune_tokens=finetune_tokens,
            store=kept.enter_context(store_beside(out)),
            display=shown,
        )
        report: Report | EncoderReport | Seq2SeqReport
        if config.format == "deepseek" and isinstance(compiled, api.CompiledModel):
            report = compiled.to_deepseek(out, shard_bytes=int(shard_size * 1e9), force=force, display=shown)
        elif config.format == "gguf" and isinstance(compiled, api.CompiledModel):
            report = compiled.to_gguf(out, force=force, display=shown)
        elif for_tensorrt and isinstance(compiled, api.CompiledModel):
            report = compiled.to_tensorrt(out, engine, force=force, display=shown)
        elif out.suffix == ".onnx":
            report = compiled.to_onnx(out, force=force, display=shown)
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
        if for_tensorrt and isinstance(compiled, api.CompiledModel):
            from mla_compile.tensorrt import commands

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


@app.command()
def inspect(
    model: Described,
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
    model: Described,
    cache_ratio: CacheRatio = None,
    kv_rank: KvRank = None,
    uniform_rank: UniformRank = False,
    exact: Exact = False,
    rope_dims: RopeDims = None,
    method: MethodName = "auto",
    layout: Layout = "free",
    svd: Svd = "joint",
    no_gradients: NoGradients = False,
    encoders: Encoders = False,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 65536,
    seq_len: SeqLen = None,
    no_cache: NoCache = False,
    dtype: Dtype = "auto",
    cache_type: CacheType = "auto",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache when a step's time is estimated.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded together.")] = 1,
    machine: Annotated[Literal["cpu", "gpu"], typer.Option(help="What to estimate the time on.")] = "cpu",
    tokenizer: Tokenizer = None,
    attn_implementation: AttnImplementation = "auto",
    unsafe_load: UnsafeLoad = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show ranks, rotating channels, cache bytes per token and the time of a step without writing anything."""
    from mla_compile import display
    from mla_compile.config import make_config
    from mla_compile.cost import MACHINES, DecodeStep, decode_costs

    config = make_config(
        method=method,
        layout=layout,
        cache_ratio=cache_ratio,
        kv_rank=kv_rank,
        uniform_rank=uniform_rank,
        exact=exact,
        rope_dims=rope_dims,
        svd=svd,
        gradients=not no_gradients,
        encoders=encoders,
        calibration_tokens=calibration_tokens,
        seq_len=seq_len,
        dtype=dtype,
        cache_type=cache_type,
    )
    shown = display.make_display(quiet or as_json)
    with shown:
        from mla_compile import api

        planned = api.plan(
            model,
            config,
            calibration=calibration,
            tokenizer=tokenizer,
            statistics_cache=not no_cache,
            attn_implementation=attn_implementation,
            unsafe_load=unsafe_load,
            display=shown,
        )
    step = DecodeStep(MACHINES[machine], context, batch)
    costs = decode_costs(planned.found.sites, planned.plans, planned.widths, step) if planned.widths else ()
    held = "int8" if cache_type == "int8" else planned.dtype
    if as_json:
        rows = display.plan_rows(planned.plans, costs, step, held, planned.source_type)
        typer.echo(json.dumps(rows | display.conversion_row(planned.conversion, planned.alike), indent=2))
    else:
        cached = held if planned.found.sites else None
        display.show_plan(planned.plans, costs, step, cached, planned.source_type)
        display.show_conversion(planned.conversion, planned.alike)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="An ONNX file or a TensorRT engine made by mla-compile.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give it several times for a batch.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k most likely; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose among the fewest tokens of this mass.")] = 1.0,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a sequence at most, prompt and continuation.",
            show_default="as many as are asked for",
        ),
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="Where to run: cpu or cuda.", callback=_known_provider, show_default="cpu")
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            help="What computes attention on the CPU: fused (needs a C++ compiler the first time), standard (the "
            "operators in the file), or auto, the former where it can be had.",
            callback=_known_kernel,
            show_default="auto",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per operator.")] = None,
    as_json: AsJson = False,
) -> None:
    """Generate text with a converted model in ONNX Runtime or TensorRT."""
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
        provider=provider,
        max_length=max_length,
        kernel=kernel,
        on_text=display.stream_text if streamed else None,
    )
    if as_json:
        typer.echo(json.dumps(display.generation_row(result)))
    else:
        display.show_generation(result, streamed)


@app.command("eval")
def evaluate(
    model: Annotated[
        list[str],
        typer.Argument(
            help="ONNX files or folders made by mla-compile, or any models 'convert' takes; one or several."
        ),
    ],
    text: Annotated[Path, typer.Option(help=".txt (documents separated by <|endoftext|>) or .jsonl.")],
    original: Annotated[
        str | None, typer.Option(help="The unconverted model, which the others are compared with.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Convert MODEL by these methods, such as fisher,transmla,mha2mla, without writing anything.",
            rich_help_panel=_TRIALS,
        ),
    ] = None,
    cache_ratios: Annotated[
        str | None,
        typer.Option(
            help="Every method at each of these cache sizes.",
            show_default="0.5,0.3125,0.25",
            rich_help_panel=_TRIALS,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text to convert by, as for convert; another than --text.", rich_help_panel=_TRIALS),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of it to use.", rich_help_panel=_TRIALS)
    ] = 65536,
    onnxruntime: Annotated[
        bool,
        typer.Option("--onnxruntime", help="Measure each conversion in ONNX Runtime too.", rich_help_panel=_TRIALS),
    ] = False,
    no_cache: NoCache = False,
    seq_len: SeqLen = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Measure on at most this many tokens.")] = None,
    tokenizer: Tokenizer = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw perplexity ratio against cache kept, to a .svg or .png file.", rich_help_panel=_OUTPUT),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plot.", rich_help_panel=_OUTPUT)] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure quality and cache size on a text, of models or of conversions made on the spot."""
    from mla_compile import display

    _check_eval(model, original, methods, cache_ratios, calibration, onnxruntime, plot)
    if plot is not None:
        from mla_compile.plot import check_plot

        check_plot(plot, force)
    shown = display.make_display(quiet or as_json)
    with shown:
        from mla_compile.measure import Sample, measure
        from mla_compile.statistics_cache import open_cache
        from mla_compile.trial import measure_conversions, read_trials

        sample = Sample(text, seq_len, max_tokens, tokenizer)
        if methods is None:
            result = measure(model, sample, original=original, display=shown)
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
                display=shown,
            )
    if plot is not None:
        from mla_compile.plot import draw

        draw(result, plot)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        display.show_measurement(result)


def _check_eval(
    model: list[str],
    original: str | None,
    methods: str | None,
    cache_ratios: str | None,
    calibration: str | None,
    onnxruntime: bool,
    plot: Path | None,
) -> None:
    """Refuse options of 'eval' that do not go together.

    Raises:
        UsageError: They do not.
    """
    given = {"--cache-ratios": cache_ratios, "--calibration": calibration, "--onnxruntime": onnxruntime}
    idle = [flag for flag, value in given.items() if value]
    if methods is None and idle:
        raise UsageError(
            f"{idle[0]} is about conversions made on the spot, and no --methods were given.",
            "Add --methods fisher,transmla,mha2mla.",
        )
    if methods is not None and (original is not None or len(model) > 1):
        raise UsageError(
            "--methods converts one model, which is the original itself.", "Give that MODEL alone, without --original."
        )
    if methods is None and original is None and plot is not None:
        raise UsageError("A plot shows models beside their original, and none was given.", "Add --original MODEL.")


@app.command("bench")
def bench_speed(
    model: Annotated[list[Path], typer.Argument(help="ONNX files made by mla-compile, of one original.")],
    against: Annotated[
        str, typer.Option(help="The original: what report.json beside the first file names, or any MODEL.")
    ] = "original",
    contexts: Annotated[
        str | None,
        typer.Option(
            help="Tokens in the cache, such as 512,4096.", show_default="512,4096; the model's limit, if that is less"
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="Sequences decoded together.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every file.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads per operator.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed over context, to a .svg or .png file.", rich_help_panel=_OUTPUT)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plot.", rich_help_panel=_OUTPUT)] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed and memory beside the original's fastest forms in ONNX Runtime, on the CPU."""
    from mla_compile import display

    if plot is not None:
        from mla_compile.plot import check_plot

        check_plot(plot, force)
    sizes = _numbers("--contexts", contexts, 2) if contexts is not None else None
    many = _numbers("--batches", batches, 1)
    shown = display.make_display(quiet or as_json)
    with shown:
        from mla_compile.bench import Workload, bench

        result = bench(model, against, Workload(sizes, many, rounds, threads), display=shown)
    if plot is not None:
        from mla_compile.plot import speed_figure, write_figure

        write_figure(lambda: speed_figure(result), plot)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
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


@app.command("finetune")
def fine_tune(
    folder: Annotated[Path, typer.Argument(help="A folder written by 'mla-compile convert MODEL --out FOLDER'.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text to train on: .txt (documents separated by <|endoftext|>), .jsonl, .parquet, or "
            "hf:NAME[:CONFIG][:SPLIT].",
            rich_help_panel=_TEXT,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, with its checkpoints.", rich_help_panel=_OUTPUT)],
    objective: Annotated[
        str,
        typer.Option(
            help="next-token (the text), kl (a teacher's predictions), attention (the original's attention outputs), "
            "or a mixture such as kl=0.9,next-token=0.1.",
            show_default="kl with a teacher, else next-token",
            rich_help_panel=_TOWARDS,
        ),
    ] = "auto",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The original, or a larger model with the same vocabulary, to learn from.", rich_help_panel=_TOWARDS
        ),
    ] = None,
    match_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Steps at the beginning that match attention outputs instead.", rich_help_panel=_TOWARDS
        ),
    ] = 0,
    train: Annotated[
        str,
        typer.Option(
            help="latent matrices, attention (with its output projections, and all norms) or all weights.",
            rich_help_panel=_TOWARDS,
        ),
    ] = "attention",
    lora_rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Train adapters of this rank instead of the matrices, which they are added to in the end.",
            show_default="none",
            rich_help_panel=_TOWARDS,
        ),
    ] = 0,
    lora_alpha: Annotated[
        int | None,
        typer.Option(
            min=1, help="Scale of adapters, times their rank.", show_default="the rank", rich_help_panel=_TOWARDS
        ),
    ] = None,
    tokens: TrainTokens = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step, of all processes.", rich_help_panel=_PACE)] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Pieces a step is computed in.", rich_help_panel=_PACE)] = 1,
    seq_len: SeqLen = None,
    rate: Annotated[
        float,
        typer.Option(help="Step size, relative to the root mean square of every weight.", rich_help_panel=_PACE),
    ] = 0.01,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="AdamW's.", rich_help_panel=_PACE)] = 0.0,
    warm_up: Annotated[float, typer.Option(help="Share of the steps to grow to it.", rich_help_panel=_PACE)] = 0.05,
    decay: Annotated[float, typer.Option(help="Share of the steps to fall to zero.", rich_help_panel=_PACE)] = 0.2,
    clip: Annotated[float, typer.Option(help="Longest gradient.", rich_help_panel=_PACE)] = 1.0,
    every: Annotated[
        int, typer.Option(min=1, help="Steps between evaluations, each with a checkpoint.", rich_help_panel=_CHECKS)
    ] = 100,
    patience: Annotated[
        int, typer.Option(min=0, help="Evaluations without improvement to end after; 0 never.", rich_help_panel=_CHECKS)
    ] = 0,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints kept, besides the best.", rich_help_panel=_OUTPUT)] = 2,
    eval_windows: Annotated[
        int, typer.Option(min=1, help="Windows of the text kept out to measure on, at most.", rich_help_panel=_CHECKS)
    ] = 32,
    mixed_precision: Annotated[
        str, typer.Option(help="no, or bf16 for products in bfloat16.", rich_help_panel=_PACE)
    ] = "no",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory, more time: activations twice.", rich_help_panel=_PACE)
    ] = False,
    tracker: Annotated[
        str, typer.Option(help="Where accelerate sends the curve, or none.", rich_help_panel=_OUTPUT)
    ] = "tensorboard",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=_OUTPUT)
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew where --out holds something.", rich_help_panel=_OUTPUT)
    ] = False,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of windows.", rich_help_panel=_PACE)] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a converted model. 'accelerate launch -m mla_compile finetune ...' runs it in several processes."""
    from mla_compile import display
    from mla_compile.training.recipe import make_recipe

    recipe = make_recipe(
        objective=objective,
        match_steps=match_steps,
        train=train,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        tokens=tokens,
        batch=batch,
        accumulate=accumulate,
        seq_len=seq_len,
        rate=rate,
        weight_decay=weight_decay,
        clip=clip,
        warm_up=warm_up,
        decay=decay,
        every=every,
        patience=patience,
        keep=keep,
        eval_windows=eval_windows,
        seed=seed,
        mixed_precision=mixed_precision,
        recompute=recompute,
        tracker=tracker,
    )
    first = os.environ.get("RANK", "0") == "0"
    shown = display.make_display(quiet or as_json or not first)
    with shown:
        from mla_compile.training.run import finetune

        report = finetune(
            folder,
            data,
            out,
            recipe,
            teacher=teacher,
            tokenizer=tokenizer,
            resume=resume,
            force=force,
            display=shown,
        )
    if report is None:
        return
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        display.show_training(report, out)


@app.command()
def export(
    folder: Annotated[
        Path,
        typer.Argument(help="A folder written by 'convert' or 'finetune'; for .gguf one of --format deepseek."),
    ],
    out: Annotated[Path, typer.Option(help="The .onnx or .gguf file to write.", rich_help_panel=_OUTPUT)],
    opset: Opset = None,
    cache: CacheKind = "dynamic",
    cache_type: CacheType = "auto",
    cache_layout: CacheLayout = "rows",
    inline: Inline = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)] = False,
    as_json: AsJson = False,
) -> None:
    """Write a saved model as ONNX, checked in ONNX Runtime, or a DeepSeek checkpoint as GGUF, checked in llama.cpp."""
    from mla_compile import display
    from mla_compile.config import make_config
    from mla_compile.saved import open_saved, write_saved_onnx

    if out.suffix == ".gguf":
        from mla_compile.gguf_file import export_gguf

        plain = cache_type in ("auto", "float32")
        if not plain or (opset, cache, cache_layout, inline) != (None, "dynamic", "rows", False):
            raise UsageError("Options of ONNX files were given for a GGUF file.", "Leave them out.")
        error = export_gguf(folder, out, force=force)
        if as_json:
            typer.echo(json.dumps({"llama_cpp_error": error}))
        else:
            display.show_gguf(out, error)
        return

    # Others are refused before anything is read.
    config = make_config(opset=opset, cache=cache, cache_type=cache_type, cache_layout=cache_layout, inline=inline)
    report = write_saved_onnx(open_saved(folder), out, config, force=force)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        display.show_exported(report["verification"], out)


@app.command()
def tensorrt(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder written by 'mla-compile convert MODEL --out FOLDER', or for an engine a file written by "
            "this command, perhaps on another machine."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .onnx or .plan file to write.", rich_help_panel=_OUTPUT)],
    max_batch: MaxBatch = 8,
    max_length: MaxLength = 4096,
    max_prompt: MaxPrompt = 128,
    plugin: Annotated[
        str,
        typer.Option(
            help="Which plugins the file's nodes are for: quick, which engines of this command have, or cpp, a library "
            "by 'build-plugin', which cuts caches into pieces itself.",
            callback=_known_plugin,
            rich_help_panel=_TENSORRT,
        ),
    ] = "quick",
    splits: Splits = 16,
    timing_cache: TimingCache = None,
    version_compatible: VersionCompatible = False,
    weight_streaming: WeightStreaming = False,
    refit: Refit = False,
    no_plugins: NoPlugins = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)] = False,
    quiet: Quiet = False,
) -> None:
    """Write a converted model for TensorRT: caches of fixed memory, nodes that plugins can take; or build an engine."""
    from mla_compile import display
    from mla_compile.progress import Stages
    from mla_compile.runtime.tensorrt.engine_builder import EngineSettings
    from mla_compile.tensorrt import commands, write_for_tensorrt

    if plugin == "cpp" and out.suffix == ".plan":
        raise UsageError(
            "Engines of this command have quick plugins.", "Name a .onnx file, and build its engine with trtexec."
        )
    pieces = None if plugin == "cpp" else splits
    settings = EngineSettings(
        max_batch,
        max_length,
        max_prompt,
        pieces,
        not no_plugins,
        version_compatible,
        timing_cache,
        weight_streaming=weight_streaming,
        refit=refit,
    )
    shown = display.make_display(quiet)
    with shown:
        written = write_for_tensorrt(source, out, settings, force=force, stages=Stages(shown))
    display.show_written(written)
    display.show_commands(*commands(written.onnx, settings))
    if plugin == "cpp":
        library = out.with_name("libmla_plugin.so")
        build, _ = commands(written.onnx, settings, library)
        display.show_library_commands(written.onnx, library, build)


@app.command("fuse")
def fuse(
    model: Annotated[Path, typer.Argument(help="An ONNX file made by mla-compile.")],
    out: Annotated[
        Path,
        typer.Option(help="The .onnx file to write, beside which goes the library, as a .so.", rich_help_panel=_OUTPUT),
    ],
    march: Annotated[str, typer.Option(help="Processor the library is for, as compilers name it.")] = "native",
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Write a file whose attention is the fused kernel, and its library, for ONNX Runtime without mla-compile."""
    from mla_compile.fuse import write_fused

    library = write_fused(model, out, march=march, force=force)
    typer.echo(f"wrote {out} and {library}")


@app.command("build-plugin")
def build_plugin(
    files: Annotated[
        list[Path], typer.Argument(help="ONNX files by 'mla-compile tensorrt --plugin cpp'; one or several.")
    ],
    tensorrt_include: Annotated[Path, typer.Option(help="The folder of TensorRT's headers, 10.3 or later.")],
    out: Annotated[Path, typer.Option(help="The .so file to write.", rich_help_panel=_OUTPUT)],
    cuda_include: Annotated[
        Path | None, typer.Option(help="The folder of CUDA's headers.", show_default="Triton's own")
    ] = None,
    architecture: Annotated[
        list[int] | None,
        typer.Option(help="A compute capability, as 90 for 9.0; several times for several.", show_default="all known"),
    ] = None,
    self_registering: Annotated[
        bool, typer.Option("--self-registering", help="Register at load, as ONNX Runtime's provider expects.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)] = False,
    quiet: Quiet = False,
) -> None:
    """Compile the plugins of ONNX files for TensorRT to a library, for trtexec and ONNX Runtime."""
    from mla_compile import display
    from mla_compile.plugin_library import build_plugin_library

    with display.make_display(quiet) as shown:
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
    if self_registering:
        typer.echo(f"{out}: give ONNX Runtime's provider trt_extra_plugin_lib_paths={out}.")
    else:
        typer.echo(f"{out}: give it to trtexec with --dynamicPlugins={out}, or load it with load_library().")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A folder written with --format deepseek, or a .gguf file.")],
    as_json: AsJson = False,
) -> None:
    """Check a DeepSeek checkpoint: stock transformers, or llama.cpp, against what the converted module answered."""
    from mla_compile import display
    from mla_compile.checkpoint_folder import verify_folder
    from mla_compile.gguf_file import verify_gguf

    if checkpoint.suffix == ".gguf":
        error, greedy = verify_gguf(checkpoint)
        found: dict[str, float | None] = {"error": error, "greedy": greedy}
    else:
        found = dataclasses.asdict(verify_folder(checkpoint))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        display.show_check(checkpoint, found)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A report.json, or the folder that it is in.")],
    measurement: Annotated[
        Path | None,
        typer.Option("--eval", help="What 'eval ... --original MODEL --json' printed: draws quality over cache kept."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The .html file to write.", show_default="report.html beside it", rich_help_panel=_OUTPUT),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Draw the report of a conversion as one page; every conversion writes one, this draws it again."""
    from mla_compile.artifacts import write_page
    from mla_compile.report_page import PAGE, read_measurement, read_report

    found = read_report(source)
    page = out or (source if source.is_dir() else source.parent) / PAGE
    write_page(found, page, None if measurement is None else read_measurement(measurement), force)
    typer.echo(str(page))


_OF_ALL = ("--help", "--version", "--install-completion", "--show-completion")
_COMMANDS = frozenset(
    {
        *(
            "convert",
            "inspect",
            "plan",
            "run",
            "eval",
            "bench",
            "verify",
            "tensorrt",
            "build-plugin",
            "finetune",
            "fuse",
        ),
        *("export", "report"),
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; ``sys.argv`` by default.

    Returns:
        The exit code: 0 done, 1 our defect, 2 usage, 3 refused, 4 quality gate, 5 verification, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in _COMMANDS and words[0] not in _OF_ALL:
        words.insert(0, "convert")  # the default verb
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        code = app(args=words or ["--help"], prog_name="mla-compile", standalone_mode=False)
    except MlaCompileError as error:
        return _fail(str(error), error.exit_code)
    except ShareDone:
        return 0
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
