"""Arguments and options that commands have in common, and the panels of the help they stand in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "CALIBRATION_TOKENS",
    "CHECKS",
    "METHOD",
    "OUTPUT",
    "PACE",
    "SIZE",
    "TENSORRT",
    "TEXT",
    "TOWARDS",
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
    "Dtype",
    "Encoders",
    "Exact",
    "Force",
    "ForcePlot",
    "Format",
    "Inline",
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
    "one_of",
]

SIZE, METHOD, TEXT, OUTPUT, CHECKS = "Size", "Method", "Text", "Output", "Checks"
TRIALS, TENSORRT = "Conversions on the spot", "TensorRT"
TOWARDS, PACE = "What is trained towards what", "Pace"


def one_of(*choices: str) -> Callable[[str | None], str | None]:
    """A callback that refuses any other value, in words, when the command line is read."""

    def checked(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"'{value}' is not one of {', '.join(choices)}")
        return value

    return checked


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
    typer.Option(help="Cache size after over before, at most.", show_default="0.3125", rich_help_panel=SIZE),
]
KvRank = Annotated[int | None, typer.Option(help="Latent rank per layer, instead of a ratio.", rich_help_panel=SIZE)]
UniformRank = Annotated[
    bool,
    typer.Option(
        "--uniform-rank",
        help="The same rank in all layers, where ranks follow from a ratio: the smallest that any of them would have.",
        rich_help_panel=SIZE,
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        help="What caches may look like, in fisher and transmla: free, or deepseek for what a stock DeepSeek-V3 "
        "checkpoint can express (one rank, one even table of frequencies with one component each).",
        rich_help_panel=METHOD,
    ),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Leave nothing out: the result must equal the original.", rich_help_panel=SIZE)
]
RopeDims = Annotated[
    int | None,
    typer.Option(
        help="Rotating channels kept: of the one rope key of all heads, or of every key/value head in mha2mla.",
        show_default="chosen; an eighth of the head in mha2mla",
        rich_help_panel=METHOD,
    ),
]
Selection = Annotated[
    str,
    typer.Option(
        help="Which rotary components keep rotating in mha2mla: high, low, uniform, 2-norm; auto is 2-norm with "
        "calibration text, else uniform.",
        rich_help_panel=METHOD,
    ),
]
Svd = Annotated[
    str,
    typer.Option(
        help="Factorise keys and values in one latent (joint) or two halves (split), in mha2mla.",
        rich_help_panel=METHOD,
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        help="How sizes and weights are chosen: fisher or transmla by what the model does on text, mha2mla by its "
        "weights; auto is mha2mla with a setting of its own (selection, svd, encoders), else fisher.",
        rich_help_panel=METHOD,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to choose by and to measure on: a .txt (documents separated by <|endoftext|>) or .jsonl file, or a "
        "dataset hf:NAME[:CONFIG][:SPLIT] (split train by default).",
        rich_help_panel=TEXT,
    ),
]
CALIBRATION_TOKENS = 65536
"""How many, by default; :class:`~mla_compile.config.CompileConfig` says the same, and takes longer to import."""
CalibrationTokens = Annotated[
    int, typer.Option(help="Tokens of it to calibrate on, from its beginning.", rich_help_panel=TEXT)
]
PolishSteps = Annotated[
    int,
    typer.Option(
        help="Train the new matrices for so many steps on the calibration text, to predict what the original does; "
        "helps most in small caches.",
        rich_help_panel=METHOD,
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per window.", show_default="the model's limit, at most 512", rich_help_panel=TEXT),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or id of the tokenizer, if the model has none.", rich_help_panel=TEXT)
]
NoGradients = Annotated[
    bool,
    typer.Option(
        "--no-gradients",
        help="Never run the model backward: less memory and time, and a little worse (fisher).",
        rich_help_panel=METHOD,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Neither reuse nor save what is measured on the text (in $MLA_COMPILE_CACHE, else ~/.cache/mla-compile).",
        rich_help_panel=TEXT,
    ),
]
Offload = Annotated[
    Path | None,
    typer.Option(
        help="Folder for activations between layers, where a model is so large that it is run layer by layer.",
        show_default="in memory, in rounds",
        rich_help_panel=TEXT,
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed of random ids and samples.", rich_help_panel=CHECKS)
]
AttnImplementation = Annotated[
    str,
    typer.Option(
        help="How a transformers model spells its attention: sdpa, eager, or auto for the first it has.",
        callback=one_of("auto", "sdpa", "eager"),
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
        rich_help_panel=METHOD,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        help="What to write: auto is what the name of --out says, hf a folder that mla_compile.load reads, deepseek a "
        "folder that stock transformers loads as DeepSeek-V3, gguf a file for llama.cpp (both take --layout deepseek).",
        rich_help_panel=OUTPUT,
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        help="With --format deepseek: flashmla is 512 latent entries and 64 rotating channels, zeros included.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
QRank = Annotated[
    int | None,
    typer.Option(
        help="With --format deepseek or gguf: numbers that the queries of a token are made from (q_lora_rank).",
        show_default="none: queries are made directly",
        rich_help_panel=SIZE,
    ),
]
TrainTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens to train on.", show_default="the text once", rich_help_panel=TEXT)
]
Opset = Annotated[
    int | None,
    typer.Option(help="ONNX operator set: 23 or 24.", show_default="23; 24 for a static cache", rich_help_panel=OUTPUT),
]
CacheKind = Annotated[
    str,
    typer.Option(
        "--cache",
        help="What an ONNX file's caches are: dynamic ones grow with every token, and any program can run them; "
        "static ones are memory of a size that the program gives them, written in place.",
        rich_help_panel=OUTPUT,
    ),
]
CacheType = Annotated[
    str,
    typer.Option(
        help="What an ONNX file's caches hold: auto for numbers of the type --dtype, or int8 codes with two scales per "
        "token, whose products are of integers; float32 is auto where that is the type.",
        rich_help_panel=OUTPUT,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of weights and caches: float32, float16 or bfloat16; auto is the model's own.",
        rich_help_panel=OUTPUT,
    ),
]
CacheLayout = Annotated[
    str,
    typer.Option(
        help="How an ONNX file's caches lie: rows; genai for onnxruntime-genai, whose configuration is then written "
        "beside the file; or paged, blocks for ONNX Runtime's CUDA provider (experimental), as --target cuda says too.",
        rich_help_panel=OUTPUT,
    ),
]
Inline = Annotated[
    bool, typer.Option("--inline", help="Standard operators only, no LatentAttention nodes.", rich_help_panel=OUTPUT)
]
Target = Annotated[
    str,
    typer.Option(
        help="What to write for: auto is what the name of --out says (ONNX Runtime for .onnx, TensorRT for .plan), "
        "tensorrt an engine, or with .onnx the file that engines are built of, cuda an ONNX file with the CUDA "
        "provider's own operator for latent attention (experimental).",
        rich_help_panel=OUTPUT,
    ),
]
MaxBatch = Annotated[int, typer.Option(min=1, help="Sequences at most.", rich_help_panel=TENSORRT)]
MaxLength = Annotated[
    int,
    typer.Option(
        min=16,
        help="Tokens that every sequence's cache has room for; no more than the model's longest.",
        rich_help_panel=TENSORRT,
    ),
]
MaxPrompt = Annotated[
    int,
    typer.Option(
        min=1,
        help="New tokens at most that run together; longer prompts come one part after another.",
        rich_help_panel=TENSORRT,
    ),
]
Splits = Annotated[
    int,
    typer.Option(min=1, max=64, help="Pieces that kernels cut every cache into.", rich_help_panel=TENSORRT),
]
TimingCache = Annotated[
    Path | None,
    typer.Option(help="File to keep measured times in, for builds to come.", rich_help_panel=TENSORRT),
]
VersionCompatible = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help="An engine that other versions of TensorRT run too, perhaps more slowly.",
        rich_help_panel=TENSORRT,
    ),
]
WeightStreaming = Annotated[
    bool,
    typer.Option(
        "--weight-streaming",
        help="An engine whose weights may stay in the host's memory where the GPU's has no room, which is slower.",
        rich_help_panel=TENSORRT,
    ),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit",
        help="An engine whose weights can be replaced without building it again, perhaps slower.",
        rich_help_panel=TENSORRT,
    ),
]
NoPlugins = Annotated[
    bool,
    typer.Option("--no-plugins", help="Standard operators only, instead of our kernels.", rich_help_panel=TENSORRT),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=OUTPUT)]
ForcePlot = Annotated[bool, typer.Option("--force", help="Replace an existing plot.", rich_help_panel=OUTPUT)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        metavar="",
        help="Tell versions, and of every layer what was decided and why; twice (-vv) with the traceback of an error.",
    ),
]
