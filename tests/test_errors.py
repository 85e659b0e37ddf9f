"""Every failure a user can cause at the command line: exit code, one sentence on standard error, and nothing left."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
import torch
from families import huggingface
from torch import nn

from mla_compile.artifacts.places import check_target
from mla_compile.cli import main
from mla_compile.conversion.targets import TARGETS
from mla_compile.errors import (
    LoadError,
    MlaCompileError,
    QualityGateError,
    RefusedError,
    UsageError,
    VerificationError,
)
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.verification import agreement

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-llama"

pytestmark = pytest.mark.usefixtures("read_once")  # what fails here fails before or after that


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def command(*words: object) -> Done:
    """Run the command line in this process; an exception that escapes is a failure of the test."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(w) for w in words])
    return Done(code, out.getvalue(), err.getvalue())


def convert(*words: object) -> Done:
    """Convert by weights alone, which needs no text."""
    return command(*words, "--method", "mha2mla")


class Bag(nn.Module):
    """A language model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)

    def forward(self, ids):
        return self.head(self.table(ids))


def archive(module: nn.Module, path: Path) -> None:
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.export.save(torch.export.export(module, (models.tokens(2, 5),), dynamic_shapes=(dynamic,)), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything the commands below are given."""
    place = tmp_path_factory.mktemp("place")
    nano = models.handwritten(models.NanoGPT)
    archive(nano, place / "nano.pt2")
    nano.tokens = nn.Embedding(1024, models.WIDTH)  # as many as the bundled tokenizer has
    nano.head = nn.Linear(models.WIDTH, 1024, bias=False)
    archive(nano, place / "wide.pt2")
    archive(models.handwritten(models.ComplexLlama), place / "rotary.pt2")
    archive(Bag(), place / "bag.pt2")
    archive(models.handwritten(models.BidirectionalGPT), place / "both-ways.pt2")
    huggingface.REFUSED["deepseek-v3"].build().save_pretrained(place / "deepseek")
    models.llama(num_hidden_layers=1).save_pretrained(place / "llama")
    (place / "cut.pt2").write_bytes((place / "nano.pt2").read_bytes()[:30_000])

    stories = runpy.run_path(str(ROOT / "examples" / "story_grammar.py"))["stories"](range(1_000_000, 1_000_010))
    (place / "text.txt").write_text("<|endoftext|>".join(stories))
    (place / "text.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    (place / "numbers.jsonl").write_text('{"text": 1}\n')
    (place / "empty.txt").write_text("")
    (place / "latin1.txt").write_bytes("café".encode("latin-1"))
    (place / "short.txt").write_text("One day.")

    (place / "garbage.onnx").write_bytes(b"garbage" * 100)
    (place / "model.gguf").write_bytes(b"GGUF")
    (place / "empty.onnx").write_bytes(b"")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [])
    graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1]))
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), place / "plain.onnx")
    (place / "file").write_text("mine")
    (place / "taken.onnx").write_text("mine")
    (place / "plot.svg").write_text("mine")
    (place / "folder.onnx").mkdir()
    (place / "full").mkdir()
    (place / "full" / "mine.txt").write_text("mine")
    (place / "others").mkdir()
    (place / "others" / "tokenizer.json").write_text("{}")

    done = convert(place / "wide.pt2", "--out", place / "good" / "wide.onnx", "--tokenizer", TINY)
    assert done.code == 0, done.err
    (place / "alone").mkdir()
    shutil.copy(place / "good" / "wide.onnx", place / "alone")
    return place


def files(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else b"" for p in sorted(place.rglob("*"))}


def assert_one_sentence(done: Done, code: int, phrase: str, quiet: bool = True) -> None:
    """One line on standard error: what went wrong, then what to do."""
    assert "Traceback" not in done.err
    assert done.code == code
    assert done.out == ""
    lines = done.err.splitlines()
    if not quiet:  # what was done until then
        lines = [line for line in lines if " s   peak " not in line]
    assert len(lines) == 1
    assert lines[0].startswith("mla-compile: ")
    assert phrase in lines[0]
    assert lines[0].count(". ") >= 1, "there is no remedy"
    assert lines[0].endswith(".")
    assert len(lines[0]) < 1000


CONVERT = {
    # ---- words
    "unknown flag": ("{nano} --out {out} --frobnicate", 2, "--frobnicate"),
    "no out": ("{nano}", 2, "--out"),
    "no model": ("convert --out {out}", 2, "model"),
    "two models": ("{nano} {nano} --out {out}", 2, "unexpected"),
    "no value": ("{nano} --out {out} --cache-ratio", 2, "--cache-ratio"),
    "ratio no number": ("{nano} --out {out} --cache-ratio half", 2, "--cache-ratio"),
    "rank no integer": ("{nano} --out {out} --kv-rank 2.5", 2, "--kv-rank"),
    "opset no number": ("{nano} --out {out} --opset abc", 2, "--opset"),
    # ---- settings
    "selection": ("{nano} --out {out} --selection best", 2, "'auto', 'high', 'low', 'uniform' or '2-norm'"),
    "svd": ("{nano} --out {out} --svd both", 2, "'joint' or 'split'"),
    "method": ("{nano} --out {out} --method palu", 2, "'mha2mla'"),
    "opset": ("{nano} --out {out} --opset 22", 2, "23 or 24"),
    "ratio 0": ("{nano} --out {out} --cache-ratio 0", 2, "greater than 0"),
    "ratio 1.5": ("{nano} --out {out} --cache-ratio 1.5", 2, "less than or equal to 1"),
    "ratio negative": ("{nano} --out {out} --cache-ratio -0.5", 2, "greater than 0"),
    "ratio nan": ("{nano} --out {out} --cache-ratio nan", 2, "cache_ratio=nan"),
    "rank 0": ("{nano} --out {out} --kv-rank 0", 2, "greater than or equal to 1"),
    "rank negative": ("{nano} --out {out} --kv-rank -3", 2, "greater than or equal to 1"),
    "rope dims negative": ("{nano} --out {out} --rope-dims -2", 2, "greater than or equal to 0"),
    "exact and rank": ("{nano} --out {out} --exact --kv-rank 3", 2, "exact and kv_rank exclude each other"),
    "fisher for what may be an encoder": (
        "{nano} --out {out} --method fisher --encoders",
        2,
        "with --calibration sampled, or choose --method mha2mla, which does without and loses more.",
    ),
    "transmla with a setting of mha2mla": (
        "{nano} --out {out} --method transmla --svd split",
        2,
        "svd belongs to the method mha2mla, not to transmla",
    ),
    "polish without text": ("{nano} --out {out} --polish-steps 5 --encoders", 2, "Polishing needs text to train on"),
    "polish exact": ("{nano} --out {out} --exact --polish-steps 5", 2, "nothing to polish"),
    "polish steps": ("{nano} --out {out} --polish-steps -1", 2, "polish_steps=-1"),
    "exact and ratio": ("{nano} --out {out} --exact --cache-ratio 1", 2, "exact and cache_ratio exclude each other"),
    "exact and rope": ("{nano} --out {out} --exact --rope-dims 2", 2, "exact keeps every rotating channel"),
    "ratio and rank": ("{nano} --out {out} --cache-ratio .5 --kv-rank 4", 2, "cache_ratio and kv_rank exclude"),
    "seed": ("{nano} --out {out} --seed -1", 2, "--seed"),
    "calibration tokens": ("{nano} --out {out} --calibration-tokens 0", 2, "calibration_tokens=0"),
    "no smaller": (
        "{tiny} --out {out} --kv-rank 100000000000",
        2,
        "The cache of all 4 layers does not shrink at this setting.",
    ),
    "no gradients without text": (
        "{nano} --out {out} --no-gradients",
        2,
        "--no-gradients says how calibration text is used, and none was given.",
    ),
    "tokens of no text": ("{nano} --out {out} --calibration-tokens 99", 2, "--calibration-tokens says how calibration"),
    "shard size no number": (
        "{nano} --out {out} --format deepseek --shard-size inf",
        2,
        "'inf' is no number",
    ),
    "window": ("{nano} --out {out} --seq-len 1", 2, "--seq-len"),
    # ---- settings that do not fit the model
    "rope dims odd": (
        "{rotary} --out {out} --rope-dims 3",
        2,
        "rope_dims=3 is not allowed: input should be a multiple",
    ),
    "ratio too small": ("{rotary} --out {out} --cache-ratio 0.03", 2, "leaves no room for a latent in attentions.0"),
    # ---- the model
    "model missing": ("{place}/none.pt2 --out {out} --exact", 2, "There is no file or folder"),
    "model cut": ("{place}/cut.pt2 --out {out}", 2, "is truncated or not a torch.export archive"),
    "model is text": ("{text} --out {out}", 2, "is not a model"),
    "model is ONNX": ("{place}/plain.onnx --out {out}", 2, "is an ONNX file, which cannot be converted"),
    "model is a folder": ("{place}/full --out {out}", 2, "has no config.json"),
    "not convertible": ("{place}/both-ways.pt2 --out {out}", 3, "2 of 2 attention layers"),
    "no attention": ("{place}/bag.pt2 --out {out}", 3, "No attention was found in"),
    # ---- the text
    "2-norm without text": ("{nano} --out {out} --selection 2-norm --encoders", 2, "needs text to measure on"),
    "limit without text": ("{nano} --out {out} --max-ppl-ratio 1.1", 2, "A perplexity limit needs text"),
    "text missing": ("{wide} --out {out} --tokenizer {tiny} --calibration none.txt", 2, "There is no text file"),
    "text is a folder": (
        "{wide} --out {out} --tokenizer {tiny} --calibration {place}",
        2,
        "is a folder, not a text file",
    ),
    "text empty": ("{wide} --out {out} --tokenizer {tiny} --calibration {place}/empty.txt", 2, "holds no text"),
    "text latin-1": ("{wide} --out {out} --tokenizer {tiny} --calibration {place}/latin1.txt", 2, "is not UTF-8 text"),
    "text short": ("{wide} --out {out} --tokenizer {tiny} --calibration {place}/short.txt", 2, "8. Give more text."),
    "bad jsonl": ("{wide} --out {out} --tokenizer {tiny} --calibration {place}/text.jsonl", 2, "Line 2 of"),
    "jsonl numbers": ("{wide} --out {out} --tokenizer {tiny} --calibration {place}/numbers.jsonl", 2, "Line 1 of"),
    "window longer than model and text": (
        "{tiny} --out {out} --calibration {place}/short.txt --seq-len 100000",
        2,
        "Use --seq-len 512 or less.",
    ),
    "window too long": ("{wide} --out {out} {calibrated} --seq-len 129", 2, "Use --seq-len 128 or less."),
    "no tokenizer": ("{wide} --out {out} --calibration {text}", 2, "Give one with --tokenizer FOLDER."),
    "no tokenizer in the folder": ("{place}/llama --out {out} --calibration {text}", 2, "tokenizer"),
    "tokenizer missing": ("{wide} --out {out} --calibration {text} --tokenizer {place}/none", 2, "tokenizer"),
    "tokenizer of another model": ("{nano} --out {out} {calibrated}", 2, "97"),
    # ---- quality
    "perplexity": ("{wide} --out {out} {calibrated} --max-ppl-ratio 0.5", 4, "above the limit of 0.5"),
    "perplexity, folder": ("{wide} --out {dir} {calibrated} --max-ppl-ratio 0.5", 4, "above the limit of 0.5"),
    "limit nan": ("{wide} --out {out} {calibrated} --max-ppl-ratio nan", 2, "ppl"),
    "limit negative": ("{wide} --out {out} {calibrated} --max-ppl-ratio -1", 2, "ppl"),
    # ---- where to write
    "below a file": ("{nano} --out {place}/file/o.onnx", 2, "cannot be created"),
    "far below a file": ("{nano} --out {place}/file/a/b", 2, "cannot be created"),
    "over a file": ("{nano} --out {place}/file", 2, "is no folder"),
    "over a file, forced": ("{nano} --out {place}/file --force", 2, "is no folder"),
    "over a device": ("{nano} --out /dev/null", 2, "'/dev/null' is no folder"),
    "taken": ("{nano} --out {place}/taken.onnx", 2, "exists already"),
    "folder taken": ("{nano} --out {place}/full", 2, "exists already"),
    "other model's files": (
        "{nano} --out {place}/others/o.onnx --tokenizer {tiny}",
        2,
        "others/tokenizer.json' exists",
    ),
    "genai in a folder": (
        "{nano} --out {out}/folder --cache-layout genai",
        2,
        "Only an ONNX file for ONNX Runtime has the cache layout genai",
    ),
    "genai int8": (
        "{nano} --out {out}.onnx --cache-layout genai --cache-type int8",
        2,
        "need a third for their scales",
    ),
    "cuda in a folder": ("{nano} --out {out}/folder --target cuda", 2, "--target cuda is an ONNX file"),
    "static in a folder": (
        "{nano} --out {out}/folder --cache static --inline",
        2,
        "--cache static, --inline: only an ONNX file for ONNX Runtime is written so",
    ),
    "static for TensorRT": ("{nano} --out {out}.onnx --target tensorrt --cache static", 2, "--cache static: only an"),
    "opset in a folder": ("{nano} --out {out}/folder --opset 24", 2, "--opset 24: only an ONNX file"),
    "inline in a checkpoint": (
        "{nano} --out {out}/folder --format deepseek --calibration {text} --inline",
        2,
        "--inline is of ONNX files, and the format deepseek is a checkpoint",
    ),
    "shards of a file": ("{nano} --out {out}.onnx --shard-size 1", 2, "--shard-size cuts the weights of --format"),
    "int8 in a folder": ("{nano} --out {out}/folder --cache-type int8", 2, "Only an ONNX file for ONNX Runtime"),
    "int8 for TensorRT": (
        "{nano} --out {out}.onnx --target tensorrt --cache-type int8",
        2,
        "Only an ONNX file for ONNX Runtime",
    ),
    "unknown suffix": ("{nano} --out {out}.safetensors", 2, "'.safetensors' is not known"),
    "suffix only": ("{nano} --out {place}/.onnx", 2, ".onnx"),
    "folder like a file": ("{nano} --out {place}/folder.onnx", 2, "is a folder"),
    "folder like a file, forced": ("{nano} --out {place}/folder.onnx --force", 2, "is a folder"),
    "into the model": ("{place}/llama --out {place}/llama --force", 2, "llama"),
    "into the model, by tokenizer": ("{place}/llama --tokenizer {tiny} --out {place}/llama --force", 2, "llama"),
}

OTHERS = {
    "inspect nothing": ("inspect", 2, "model"),
    "inspect missing": ("inspect {place}/none", 2, "There is no file or folder"),
    "inspect missing, json": ("inspect {place}/none --json", 2, "There is no file or folder"),
    "plan missing": ("plan {place}/none.pt2 --method mha2mla", 2, "There is no file or folder"),
    "plan setting": ("plan {nano} --svd both", 2, "'joint' or 'split'"),
    "plan converted file": ("plan {good}", 2, "is an ONNX file, which cannot be converted."),
    "convert converted file": ("{good} --out {place}/x.onnx", 2, "is an ONNX file, which cannot be converted."),
    "plan converted folder": ("plan {place}/good", 2, "holds a converted model in a file"),
    "plan archive without tokenizer": (
        "plan {nano} --calibration {text} -q",
        2,
        "The model comes without a tokenizer. Give one with --tokenizer FOLDER.",
    ),
    "plan without text": ("plan {nano}", 2, "with --calibration sampled, or add --method mha2mla for a quick"),
    "plan no smaller": (
        "plan {tiny}/config.json --kv-rank 100000000000 -q",
        2,
        "The cache of all 4 layers does not shrink at this setting. Take the original, or a smaller --cache-ratio",
    ),
    "plan by text without text": ("plan {nano} --method fisher", 2, "Give some with --calibration FILE"),
    "plan not convertible": ("plan {place}/both-ways.pt2 --exact -q", 3, "2 of 2 attention layers"),
    "plan no attention": ("plan {place}/bag.pt2 --exact --json", 3, "No attention was found in"),
    "run nothing": ("run --prompt x", 2, "model"),
    "run without prompt": ("run {good}", 2, "--prompt"),
    "run prompt file": ("run {good} --prompt-file {place}/none.txt", 2, "cannot be read (No such file"),
    "run stop at nothing": ("run {good} --prompt x --stop=", 2, "A text to stop at is empty"),
    "run no tokens": ("run {good} --prompt x --max-new-tokens 0", 2, "--max-new-tokens"),
    "run temperature": ("run {good} --prompt x --temperature -1", 2, "--temperature"),
    "run top-k": ("run {good} --prompt x --top-k -1", 2, "--top-k"),
    "run top-p": ("run {good} --prompt x --top-p 2", 2, "--top-p"),
    "run seed": ("run {good} --prompt x --temperature 1 --seed -1", 2, "seed"),
    "run provider": ("run {good} --prompt x --provider tpu", 2, "'tpu' is not one of cpu, cuda"),
    "run provider that is missing": ("run {good} --prompt x --provider cuda", 2, "pip install 'mla-compile[gpu]'"),
    "run beyond max-length": ("run {good} --prompt x --max-length 4", 2, "Raise --max-length"),
    "run max-length": ("run {good} --prompt x --max-length 0", 2, "--max-length"),
    "run threads": ("run {good} --prompt x --threads 0", 2, "--threads"),
    "run missing": ("run {place}/none.onnx --prompt x", 2, "There is no file"),
    "run folder": ("run {place}/full --prompt x", 2, "holds no converted model that runs here"),
    "run garbage": ("run {place}/garbage.onnx --prompt x", 2, "ONNX Runtime cannot load"),
    "run empty": ("run {place}/empty.onnx --prompt x", 2, "ONNX Runtime cannot load"),
    "run another model": ("run {place}/plain.onnx --prompt x", 2, "plain.onnx' was not made by mla-compile. Convert"),
    "run archive": ("run {nano} --prompt x", 2, "is no file that runs here. Convert it first: mla-compile MODEL --out"),
    "run gguf": (
        "run {place}/model.gguf --prompt x",
        2,
        "is no file that runs here. Run it in llama.cpp: llama-cli -m",
    ),
    "export converted file": (
        "export {good} --out {place}/x.onnx",
        2,
        "is a model as a file, and this takes one as a folder. Write that by:",
    ),
    "run without tokenizer": ("run {place}/alone/wide.onnx --prompt x", 2, "Give one with --tokenizer FOLDER."),
    "run past the end": ("run {good} --prompt x --max-new-tokens 300 --json", 2, "128"),
    "eval without text": ("eval {good}", 2, "--text"),
    "eval missing": ("eval {place}/none.onnx --text {text}", 2, "There is no file"),
    "eval folder of a file": ("eval {place}/good --text {text}", 2, "but wide.onnx. Name the file:"),
    "eval garbage": ("eval {place}/garbage.onnx --text {text}", 2, "ONNX Runtime cannot load"),
    "eval garbage, json": ("eval {place}/garbage.onnx --text {text} --json", 2, "ONNX Runtime cannot load"),
    "eval another model": (
        "eval {place}/plain.onnx --text {text}",
        2,
        "plain.onnx' was not made by mla-compile. Convert",
    ),
    "eval text missing": ("eval {good} --text {place}/none.txt", 2, "There is no text file"),
    "eval bad jsonl": ("eval {good} --text {place}/text.jsonl --json", 2, "Line 2 of"),
    "eval text short": ("eval {good} --text {place}/short.txt -q", 2, "of 128. Give more text."),
    "eval window 0": ("eval {good} --text {text} --seq-len 0 -q", 2, "seq-len"),
    "eval window 1": ("eval {good} --text {text} --seq-len 1 -q", 2, "seq-len"),
    "eval window negative": ("eval {good} --text {text} --seq-len -3 -q", 2, "seq-len"),
    "eval window too long": ("eval {good} --text {text} --seq-len 129 -q", 2, "--seq-len 128"),
    "eval original window": ("eval {wide} --text {text} --seq-len 129 -q --tokenizer {tiny}", 2, "--seq-len 128"),
    "eval one token": ("eval {good} --text {text} --max-tokens 1", 2, "--max-tokens"),
    "eval without tokenizer": ("eval {wide} --text {text} -q", 2, "Give one with --tokenizer FOLDER."),
    "eval original missing": ("eval {good} --text {text} --original {place}/none -q", 2, "There is no file or folder"),
    "eval text short, tokens": (
        "eval {good} --text {place}/short.txt -q",
        2,
        "has 4 tokens, fewer than one window of 128",
    ),
    "eval other vocabulary": ("eval {good} {nano} --text {text} --tokenizer {tiny} -q", 2, "(1024 and 97 tokens)"),
    "eval other original": (
        "eval {good} --original {nano} --text {text} --tokenizer {tiny} -q",
        2,
        "have different vocabularies (1024 and 97 tokens), so that figures per token cannot be compared.",
    ),
    "eval method": ("eval {wide} --text {text} --methods palu", 2, "Choose some of fisher,transmla,mha2mla."),
    "eval no method": ("eval {wide} --text {text} --methods fisher,", 2, "There is no method ''."),
    "eval method without text": ("eval {wide} --text {text} --methods mha2mla,fisher", 2, "--calibration sampled."),
    "eval ratio no number": (
        "eval {wide} --text {text} --methods mha2mla --cache-ratios 0.5,half",
        2,
        "'half' is not a cache ratio. Give numbers above 0 and up to 1, such as 0.5,0.25.",
    ),
    "eval ratio 0": ("eval {wide} --text {text} --methods mha2mla --cache-ratios 0", 2, "'0' is not a cache ratio"),
    "eval ratio 1.5": ("eval {wide} --text {text} --methods mha2mla --cache-ratios 1.5", 2, "'1.5' is not a cache"),
    "eval ratio nan": ("eval {wide} --text {text} --methods mha2mla --cache-ratios nan", 2, "'nan' is not a cache"),
    "eval methods, converted file": ("eval {good} --text {text} --methods mha2mla -q", 2, "which cannot be converted"),
    "eval methods, two models": ("eval {wide} {nano} --text {text} --methods mha2mla", 2, "Give that MODEL alone"),
    "eval methods, original": (
        "eval {wide} --original {wide} --text {text} --methods mha2mla",
        2,
        "--methods converts one model, which is the original itself.",
    ),
    "eval methods, not convertible": (
        "eval {place}/both-ways.pt2 --text {text} --methods mha2mla -q",
        3,
        "2 of 2 attention layers",
    ),
    "eval calibration short": (
        "eval {wide} --text {text} --methods fisher --calibration {place}/short.txt --tokenizer {tiny} -q",
        2,
        "The calibration text has 4 tokens, fewer than one window of 128.",
    ),
    "eval ratios without methods": ("eval {good} --text {text} --cache-ratios 0.5", 2, "no --methods were given"),
    "eval calibration without methods": ("eval {good} --text {text} --calibration {text}", 2, "no --methods were"),
    "eval runtime without methods": ("eval {good} --text {text} --onnxruntime", 2, "Add --methods fisher,transmla"),
    "eval plot alone": ("eval {good} --text {text} --plot {place}/new.svg", 2, "Add --original MODEL."),
    "eval plot suffix": (
        "eval {good} --original {wide} --text {text} --plot {place}/new.pdf",
        2,
        "Name a .svg or .png file.",
    ),
    "eval plot taken": ("eval {wide} --methods mha2mla --text {text} --plot {place}/plot.svg", 2, "exists already"),
    "eval plot below a file": (
        "eval {wide} --methods mha2mla --text {text} --plot {place}/file/a.svg",
        2,
        "cannot be created",
    ),
    "eval tokenizer of another": ("eval {nano} --text {text} --tokenizer {tiny} -q", 2, "97"),
}


def fill(words: str, place: Path, out: Path) -> list[str]:
    names = {
        "place": place,
        "nano": place / "nano.pt2",
        "wide": place / "wide.pt2",
        "rotary": place / "rotary.pt2",
        "good": place / "good" / "wide.onnx",
        "text": place / "text.txt",
        "tiny": TINY,
        "calibrated": "--tokenizer {tiny} --calibration {text}",
        "out": out / "new" / "o.onnx",
        "dir": out / "new" / "folder",
    }
    while "{" in words:
        words = words.format_map(names)
    return words.split()


@pytest.mark.parametrize("case", CONVERT)
def test_conversion_that_fails(case, place, tmp_path):
    words, code, phrase = CONVERT[case]
    before = files(place)
    given = [*fill(words, place, tmp_path), "--quiet"]
    by_text = {"--method", "--calibration", "--exact"} & {*given}
    done = command(*given) if by_text else convert(*given)
    assert files(place) == before
    assert not list(tmp_path.iterdir())
    assert_one_sentence(done, code, phrase)


@pytest.mark.parametrize("case", OTHERS)
def test_other_command_that_fails(case, place, tmp_path):
    words, code, phrase = OTHERS[case]
    before = files(place)
    done = command(*fill(words, place, tmp_path))
    assert files(place) == before
    assert_one_sentence(done, code, phrase)


def test_every_layer_is_refused_with_its_reason(place, tmp_path):
    done = convert(place / "deepseek", "--out", tmp_path / "o.onnx")
    assert_one_sentence(
        done, 3, f"2 of 2 attention layers of '{place / 'deepseek'}' cannot be converted: ", quiet=False
    )
    for layer in (0, 1):
        assert f"model.layers.{layer}.self_attn: the key comes from a latent" in done.err
    assert done.err.count("[latent]") == 2


def test_the_table_of_refused_layers_goes_to_standard_output(place):
    """And what a conversion would say of them to the other stream."""
    done = command("inspect", place / "both-ways.pt2", "-q")
    told = r"mla-compile: 2 of 2 attention layers of '.*' cannot be converted: .* Pass --encoders .*\.\n"
    assert done.code == 3
    assert re.fullmatch(told, done.err)
    assert done.out.count("no: mask") == 2
    done = command("inspect", place / "both-ways.pt2", "--json")
    assert done.code == 3
    assert re.fullmatch(told, done.err)
    assert [(row["path"], row["rejected"]) for row in json.loads(done.out)["layers"]] == [
        ("attentions.0", "mask"),
        ("attentions.1", "mask"),
    ]


def test_a_model_without_attention_is_inspected(place):
    done = command("inspect", place / "bag.pt2", "-q")
    assert (done.code, done.out) == (3, "No attention was found.\n")
    assert done.err.startswith(f"mla-compile: No attention was found in '{place / 'bag.pt2'}'. ")


def test_the_window_recommended_by_the_error_works(place, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. " * 6, encoding="utf-8")
    words = [
        place / "wide.pt2",
        "--out",
        tmp_path / "o",
        "--tokenizer",
        TINY,
        "--calibration",
        text,
        "-q",
    ]
    words += ["--max-ppl-ratio", 0.5]  # which fails, but after the text was read
    seq_len = command(*words).err.split("--seq-len ")[1].rstrip(".\n")
    assert command(*words, "--seq-len", seq_len).code == 4


def test_errors_after_some_work_come_after_the_stages(place, tmp_path):
    done = convert(place / "both-ways.pt2", "--out", tmp_path / "o.onnx")
    assert_one_sentence(done, 3, "2 of 2 attention layers", quiet=False)


def test_json_changes_nothing_about_errors(place, tmp_path):
    done = convert(place / "both-ways.pt2", "--out", tmp_path / "o.onnx", "--json")
    assert_one_sentence(done, 3, "2 of 2 attention layers")


@pytest.mark.parametrize("name", ["o.onnx", "folder"])
def test_verification_that_fails_leaves_nothing(place, tmp_path, name, monkeypatch):
    monkeypatch.setattr(agreement, "TOLERANCE", 0.0)
    done = convert(place / "nano.pt2", "--out", tmp_path / "new" / name, "-q")
    assert_one_sentence(done, 5, "The rewritten graph at full rank differs from the original model by ")
    assert not list(tmp_path.iterdir())


def test_verification_of_the_file_that_fails_leaves_nothing(place, tmp_path, monkeypatch):
    right = OnnxDecoder.step

    def step(self, *arguments):
        logits, cache = right(self, *arguments)
        return logits + np.float32(1), cache

    monkeypatch.setattr(OnnxDecoder, "step", step)
    done = convert(place / "nano.pt2", "--out", tmp_path / "a" / "b" / "o.onnx", "-q")
    assert_one_sentence(done, 5, "ONNX Runtime differs from the converted PyTorch module")
    assert not list(tmp_path.iterdir())


def test_a_failed_replacement_keeps_the_old_file(place, tmp_path, monkeypatch):
    monkeypatch.setattr(OnnxDecoder, "step", lambda self, *arguments: 1 / 0)
    (tmp_path / "o.onnx").write_text("old")
    with pytest.raises(ZeroDivisionError):  # a defect of ours, not an error of the user's
        convert(place / "nano.pt2", "--out", tmp_path / "o.onnx", "--force", "-q")
    assert files(tmp_path) == {"o.onnx": b"old"}


@pytest.mark.parametrize("name", ["o.onnx", "folder"])
def test_a_full_disk_leaves_nothing(place, tmp_path, name, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mla_compile.artifacts.onnx_files.lower_to_onnx", full)
    monkeypatch.setattr("torch.export.save", full)
    done = convert(place / "nano.pt2", "--out", tmp_path / "new" / name, "-q")
    assert_one_sentence(done, 2, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(place, tmp_path, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("mla_compile.artifacts.onnx_files.lower_to_onnx", interrupt)
    done = convert(place / "nano.pt2", "--out", tmp_path / "new" / "o.onnx", "-q")
    assert (done.code, done.err) == (130, "mla-compile: Interrupted.\n")
    assert not list(tmp_path.iterdir())


def test_a_file_that_ends_early_is_no_interrupt(place, tmp_path, monkeypatch):
    """The parser takes an ``EOFError`` for the end of what is typed; it is a defect of ours, and shown as one."""

    def ended(*arguments, **keywords):
        raise EOFError("No data left in file")

    monkeypatch.setattr("mla_compile.artifacts.onnx_files.lower_to_onnx", ended)
    with pytest.raises(EOFError, match="No data left"):
        convert(place / "nano.pt2", "--out", tmp_path / "new" / "o.onnx", "-q")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write to")
def test_a_folder_nobody_can_write_to(place):
    assert_one_sentence(convert(place / "nano.pt2", "--out", "/proc/new/o.onnx", "-q"), 2, "cannot be written")


@pytest.mark.usefixtures("binding_permissions")
@pytest.mark.parametrize("name", ["o.onnx", "folder"])
def test_a_read_only_folder(place, tmp_path, name):
    tmp_path.chmod(0o500)
    assert_one_sentence(convert(place / "nano.pt2", "--out", tmp_path / name, "-q"), 2, "cannot be written")


def test_an_empty_prompt_without_begin_token(place, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    words = ("run", place / "good" / "wide.onnx", "--tokenizer", tmp_path, "--max-new-tokens", 2)
    assert_one_sentence(command(*words, "--prompt", "", "--prompt", "x"), 2, "A prompt is empty")
    assert command(*words, "--prompt", "x", "--json").code == 0


def test_the_version_is_printed():
    done = command("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("mla-compile 0.")


def test_no_words_at_all_show_the_help():
    done = command()
    assert done.code == 2
    assert "Usage: mla-compile" in done.out + done.err


@pytest.mark.parametrize("case", ["model missing", "no out", "unknown flag"])
def test_the_installed_program_fails_the_same_way(case, place, tmp_path):
    """In a process of its own: the exit code arrives, and no library talks in between."""
    words, code, phrase = CONVERT[case]
    words = [sys.executable, "-m", "mla_compile", *fill(words, place, tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert_one_sentence(Done(done.returncode, done.stdout, done.stderr), code, phrase)


def test_a_module_that_cannot_be_exported_prints_nothing_of_torch(tmp_path):
    torch.save(nn.Linear(3, 3), tmp_path / "linear.pt")
    words = (tmp_path / "linear.pt", "--unsafe-load", "--method", "mha2mla", "--out", tmp_path / "o.onnx", "-q")
    done = subprocess.run([sys.executable, "-m", "mla_compile", *words], capture_output=True, text=True)
    assert_one_sentence(Done(done.returncode, done.stdout, done.stderr), 2, "linear.pt")


def test_evaluation_prints_nothing_of_the_runtime(place):
    """Trying how long a model can be must not show ONNX Runtime's own errors."""
    words = ("eval", place / "good" / "wide.onnx", "--text", place / "text.txt", "--json")
    done = subprocess.run([sys.executable, "-m", "mla_compile", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["seq_len"] == 128


@pytest.mark.parametrize("name", ["llama-3.2-1b-mla", "Qwen2.5-mla", "model.v2", "v1.0", "folder"])
def test_a_version_is_no_suffix(name, tmp_path):
    for check in (check_target, TARGETS["hf"].check):
        check(tmp_path / name, False)


@pytest.mark.parametrize("name", ["model.safetensors", "a-1.5.bin", "model.pt2", "model.ONNX"])
def test_a_suffix_is_that_of_a_file(name, tmp_path):
    with pytest.raises(UsageError, match="is not known"):
        check_target(tmp_path / name, False)
    with pytest.raises(UsageError, match="names a file"):
        TARGETS["hf"].check(tmp_path / name, False)


def test_the_error_tree():
    codes = {UsageError: 2, LoadError: 2, RefusedError: 3, QualityGateError: 4, VerificationError: 5}
    for kind, code in codes.items():
        error = kind("It failed.", "Do something.")
        assert isinstance(error, MlaCompileError)
        assert error.exit_code == code
        assert str(error) == "It failed. Do something."
