"""Arguments and options that commands have in common, and the panels of the help they stand in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mla_compile.errors import UsageError

__all__ = [
    "CALIBRATION_TOKENS",
    "CHECKS",
    "METHOD",
    "OBJECTIVE",
    "OUTPUT",
    "SCHEDULE",
    "SHARD_SIZE",
    "SIZE",
    "TENSORRT",
    "TEXT",
    "TRIALS",
    "AsJson",
    "AttnImplementation",
    "CacheKind",
    "CacheLayout",
    "CacheRatio",
    "CacheType",
    "Calibration",
    "CalibrationTokens",
    "Described",
    "Device",
    "Dtype",
    "Encoders",
    "Exact",
    "Force",
    "ForcePlot",
    "Format",
    "Inline",
    "Jobs",
    "KvRank",
    "Layout",
    "MaxBatch",
    "MaxLength",
    "MaxPrompt",
    "MethodName",
    "Model",
    "NoCache",
    "NoGradients",
    "NoPlugins",
    "Offload",
    "Opset",
    "PolishSteps",
    "Preset",
    "QRank",
    "Quiet",
    "Refit",
    "RopeDims",
    "Seed",
    "Selection",
    "SeqLen",
    "ShardSize",
    "Splits",
    "Svd",
    "Target",
    "TimingCache",
    "Tokenizer",
    "TrainTokens",
    "UniformRank",
    "UnsafeLoad",
    "Verbose",
    "VersionCompatible",
    "WeightStreaming",
    "a_number",
    "one_of",
    "require_no_shards",
]

SIZE, METHOD, TEXT, OUTPUT, CHECKS = "Size", "Method", "Text", "Output", "Checks"
TRIALS, TENSORRT = "Trial conversions", "TensorRT"
OBJECTIVE, SCHEDULE = "Objective and weights", "Schedule"
SHARD_SIZE = 5.0
"""GB of a weight file, at most."""


def one_of(*choices: str) -> Callable[[str | None], str | None]:
    """A callback that refuses any other value, in words, when the command line is read."""

    def checked(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"'{value}' is not one of {', '.join(choices)}")
        return value

    return checked


def a_number(value: float | None) -> float | None:
    """A callback that refuses what floats spell besides numbers, when the command line is read."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"'{value}' is no number")
    return value


def require_no_shards(shard_size: float) -> None:
    """Refuse a size of weight files where there is one file.

    Raises:
        UsageError: One was given.
    """
    if shard_size != SHARD_SIZE:
        raise UsageError(
            "--shard-size cuts the weights of --format deepseek, and something else is written.",
            "Add --format deepseek, or leave it out.",
        )


Model = Annotated[str, typer.Argument(help="A torch.export archive (.pt2, .pt), a Hugging Face folder, or a hub id.")]
Described = Annotated[
    str,
    typer.Argument(
        help="A torch.export archive (.pt2, .pt), a Hugging Face folder, or a hub id. A config.json, or a folder "
        "without weights, is enough."
    ),
]
CacheRatio = Annotated[
    float | None,
    typer.Option(
        help="Largest cache size, as a fraction of the original.", show_default="0.3125", rich_help_panel=SIZE
    ),
]
KvRank = Annotated[
    int | None, typer.Option(help="Latent rank of every layer, instead of a ratio.", rich_help_panel=SIZE)
]
UniformRank = Annotated[
    bool,
    typer.Option(
        "--uniform-rank",
        help="With a ratio, give every layer the same rank: the smallest that any of them would get.",
        rich_help_panel=SIZE,
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="Cache layout for fisher and transmla: free, or deepseek for what a stock DeepSeek-V3 checkpoint can "
        "express (one rank, one geometric table of frequencies with one component each).",
        show_default="free; deepseek with --format deepseek or gguf",
        rich_help_panel=METHOD,
    ),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Discard nothing: the result must equal the original.", rich_help_panel=SIZE)
]
RopeDims = Annotated[
    int | None,
    typer.Option(
        help="Rotating channels to keep: in the rope key shared by all heads, or in every key/value head with mha2mla.",
        show_default="chosen; an eighth of the head with mha2mla",
        rich_help_panel=METHOD,
    ),
]
Selection = Annotated[
    str,
    typer.Option(
        help="Which rotary components keep rotating with mha2mla: high, low, uniform or 2-norm; auto is 2-norm with "
        "calibration text, else uniform.",
        rich_help_panel=METHOD,
    ),
]
Svd = Annotated[
    str,
    typer.Option(
        help="With mha2mla, factorise keys and values into one latent (joint) or into two halves (split).",
        rich_help_panel=METHOD,
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        help="How sizes and weights are chosen: fisher and transmla from what the model does on text, mha2mla from "
        "its weights; auto is mha2mla if --selection, --svd or --encoders is given, else fisher.",
        rich_help_panel=METHOD,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate and measure on: a .txt file (documents separated by <|endoftext|>), a .jsonl file, "
        "a dataset hf:NAME[:CONFIG][:SPLIT] (split train by default), or 'sampled' to let the model write it, as "
        "convert does where text is needed and none is given.",
        rich_help_panel=TEXT,
    ),
]
CALIBRATION_TOKENS = 65536
"""How many, by default; :class:`~mla_compile.config.CompileConfig` says the same, and takes longer to import."""
CalibrationTokens = Annotated[
    int, typer.Option(help="Tokens to calibrate on, from the beginning of the text.", rich_help_panel=TEXT)
]
PolishSteps = Annotated[
    int,
    typer.Option(
        help="Train the new matrices for this many steps on the calibration text to match the original's predictions; "
        "helps small caches most.",
        rich_help_panel=METHOD,
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per window.", show_default="the model's limit, at most 512", rich_help_panel=TEXT),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or hub id of the tokenizer, if the model has none.", rich_help_panel=TEXT)
]
NoGradients = Annotated[
    bool,
    typer.Option(
        "--no-gradients",
        help="Skip the backward pass over the text: less memory and time, with fisher slightly lower quality, and no "
        "cost in nats of single layers in the report.",
        rich_help_panel=METHOD,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Neither reuse nor save statistics of the text (in $MLA_COMPILE_CACHE, else ~/.cache/mla-compile).",
        rich_help_panel=TEXT,
    ),
]
Offload = Annotated[
    Path | None,
    typer.Option(
        help="Folder for activations, when a model is too large to hold them in memory.",
        show_default="in memory, in rounds",
        rich_help_panel=TEXT,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device on which the model runs on text and layers are factorised, such as cuda or cuda:1. Only polishing "
        "and writing text need room for the whole model there.",
        show_default="cpu",
        rich_help_panel=METHOD,
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        help="Layers to factorise at a time, on a core each; each takes the memory of one.",
        rich_help_panel=METHOD,
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed for random token ids and sampling.", rich_help_panel=CHECKS)
]
AttnImplementation = Annotated[
    str,
    typer.Option(
        help="Attention implementation of a transformers model: sdpa, eager, or auto for the first it supports.",
        callback=one_of("auto", "sdpa", "eager"),
    ),
]
UnsafeLoad = Annotated[
    bool, typer.Option("--unsafe-load", help="Unpickle a module from a file, which runs any code in it.")
]
Encoders = Annotated[
    bool,
    typer.Option(
        "--encoders",
        help="Also convert encoders (their projections become low-rank; they have no cache) and the decoder of an "
        "encoder-decoder.",
        rich_help_panel=METHOD,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        help="Output format: auto follows the name of --out; hf is a folder for mla_compile.load; deepseek is a folder "
        "that stock transformers loads as DeepSeek-V3; gguf is a file for llama.cpp (both use --layout deepseek).",
        rich_help_panel=OUTPUT,
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        help="With --format deepseek: flashmla pads with zeros to 512 latent entries and 64 rotating channels.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
ShardSize = Annotated[
    float,
    typer.Option(
        min=0.001,
        help="With --format deepseek: largest weight file, in GB.",
        rich_help_panel=OUTPUT,
        callback=a_number,
    ),
]
QRank = Annotated[
    int | None,
    typer.Option(
        help="With --format deepseek or gguf: rank of the queries' own latent (q_lora_rank).",
        show_default="none: a full-rank query projection",
        rich_help_panel=SIZE,
    ),
]
TrainTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens to train on, rounded up to whole steps (of --batch times --seq-len tokens in finetune, and by "
        "default).",
        show_default="the text once",
        rich_help_panel=TEXT,
    ),
]
Opset = Annotated[
    int | None,
    typer.Option(help="ONNX operator set: 23 or 24.", show_default="23; 24 for a static cache", rich_help_panel=OUTPUT),
]
CacheKind = Annotated[
    str,
    typer.Option(
        "--cache",
        help="Caches of the ONNX file: dynamic caches grow with every token, and any program can run them; static "
        "caches are buffers that the program allocates once, written in place.",
        rich_help_panel=OUTPUT,
    ),
]
CacheType = Annotated[
    str,
    typer.Option(
        help="Cache type of the ONNX file: auto is that of --dtype; int8 stores codes with two scales per token and "
        "uses integer products; float32 is the same as auto where --dtype is float32.",
        rich_help_panel=OUTPUT,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of weights and caches: float32, float16 or bfloat16; auto keeps the model's own.",
        rich_help_panel=OUTPUT,
    ),
]
CacheLayout = Annotated[
    str,
    typer.Option(
        help="Cache layout of the ONNX file: rows; genai for onnxruntime-genai, with its configuration beside it; "
        "or paged for ONNX Runtime's CUDA provider (experimental), the same as --target cuda.",
        rich_help_panel=OUTPUT,
    ),
]
Inline = Annotated[
    bool,
    typer.Option("--inline", help="Use standard operators only, no LatentAttention nodes.", rich_help_panel=OUTPUT),
]
Target = Annotated[
    str,
    typer.Option(
        help="Target runtime: auto follows the name of --out (ONNX Runtime for .onnx, TensorRT for .plan); tensorrt "
        "writes an engine or, with .onnx, the file to build engines from; cuda writes an ONNX file with the CUDA "
        "provider's own operator for latent attention (experimental).",
        rich_help_panel=OUTPUT,
    ),
]
MaxBatch = Annotated[int, typer.Option(min=1, help="Largest batch size.", rich_help_panel=TENSORRT)]
MaxLength = Annotated[
    int,
    typer.Option(
        min=16,
        help="Cache capacity in tokens per sequence, at most the model's own limit.",
        rich_help_panel=TENSORRT,
    ),
]
MaxPrompt = Annotated[
    int,
    typer.Option(
        min=1,
        help="Most new tokens in one call; longer prompts are processed in chunks.",
        rich_help_panel=TENSORRT,
    ),
]
Splits = Annotated[
    int,
    typer.Option(min=1, max=64, help="Pieces that the kernels split every cache into.", rich_help_panel=TENSORRT),
]
TimingCache = Annotated[
    Path | None,
    typer.Option(help="File that keeps kernel timings for later builds.", rich_help_panel=TENSORRT),
]
VersionCompatible = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help="Build an engine that other TensorRT versions can run, perhaps more slowly.",
        rich_help_panel=TENSORRT,
    ),
]
WeightStreaming = Annotated[
    bool,
    typer.Option(
        "--weight-streaming",
        help="Build an engine whose weights may stay in host memory when GPU memory is short, which is slower.",
        rich_help_panel=TENSORRT,
    ),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit",
        help="Build an engine whose weights can be replaced without a rebuild, perhaps slower.",
        rich_help_panel=TENSORRT,
    ),
]
NoPlugins = Annotated[
    bool,
    typer.Option("--no-plugins", help="Use standard operators only, not our kernels.", rich_help_panel=TENSORRT),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=OUTPUT)]
ForcePlot = Annotated[bool, typer.Option("--force", help="Replace an existing plot.", rich_help_panel=OUTPUT)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        metavar="",
        help="Show versions, and the decision for every layer with its reason; -vv adds the traceback of an error.",
    ),
]
