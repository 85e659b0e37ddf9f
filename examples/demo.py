"""The whole path on the bundled model: convert, run in ONNX Runtime beside the original, and compare.

Run it with ``make demo``, or ``python examples/demo.py [--out FOLDER]``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from story_grammar import HELD_OUT_SEEDS, TRAIN_SEEDS, stories
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import mla_compile
from mla_compile.display import make_display, show_report
from mla_compile.runtime import OnnxDecoder
from mla_compile.text.corpus import token_windows, tokenize
from mla_compile.text.evaluate import perplexity

MODEL = Path(__file__).parent / "tiny-llama"
RATIO = 0.25
CONVERSIONS: dict[str, dict[str, Any]] = {
    "fisher": {"method": "fisher"},
    "fisher, polished": {"method": "fisher", "polish_steps": 60},
    "mha2mla": {"method": "mha2mla"},
}
"""Three ways to spend the same cache: our method, the same with a short training, and the MHA2MLA paper's defaults."""
BEST = "fisher, polished"
PROMPTS = ("In a little house by the hill lived a", "There once was a kind")
NEW_TOKENS = 120


@dataclass(frozen=True)
class Written:
    """A prompt and its continuation of some tokens, which took some seconds."""

    text: str
    tokens: int
    seconds: float


def written_by_original(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Written:
    """Continue a prompt with the original in PyTorch, with its own KV cache."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    model.generate(ids, max_new_tokens=4, do_sample=False)  # the first call sets things up
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    seconds = time.perf_counter() - start
    new = out[0, ids.shape[1] :]
    return Written(prompt + tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def written_by_conversion(decoder: OnnxDecoder, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Written:
    """Continue a prompt with the converted model in ONNX Runtime."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    decoder.generate([ids], 4)
    start = time.perf_counter()
    (new,) = decoder.generate([ids], NEW_TOKENS, stop=[tokenizer.eos_token_id])
    seconds = time.perf_counter() - start
    return Written(prompt + tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def speed(written: Sequence[Written]) -> str:
    """Tokens per second over all prompts."""
    return f"{sum(w.tokens for w in written) / sum(w.seconds for w in written):.0f}"


def main() -> int:
    """Convert, generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    folder: Path = parser.parse_args().out
    console = Console()
    transformers_logging.set_verbosity_error()
    calibration = list(stories(TRAIN_SEEDS[:300]))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    evaluation = token_windows(tokenize(list(stories(HELD_OUT_SEEDS)), tokenizer), 256, 8192)
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()

    decoders, paths = {}, {}
    for name, settings in CONVERSIONS.items():
        console.rule(f"convert: {', '.join(f'{k}={v}' for k, v in settings.items())}")
        path = folder / name.replace(", ", "-") / "model_mla.onnx"
        with make_display(quiet=False) as display:
            model = mla_compile.compile(
                MODEL,
                calibration=calibration,
                cache_ratio=RATIO,
                statistics_cache=folder / "statistics",
                display=display,
                **settings,
            )
            report = model.to_onnx(path, force=True, display=display)
        if name == BEST:
            show_report(report, path)
        decoders[name], paths[name] = OnnxDecoder(path), path

    console.rule("generate: the original in PyTorch, the conversions in ONNX Runtime")
    written: dict[str, list[Written]] = {name: [] for name in ("original", *decoders)}
    for prompt in PROMPTS:
        written["original"].append(written_by_original(original, tokenizer, prompt))
        for name, decoder in decoders.items():
            written[name].append(written_by_conversion(decoder, tokenizer, prompt))
        console.print(
            "\n\n".join(f"[bold]{name}[/bold]\n{escape(texts[-1].text)}" for name, texts in written.items()),
            highlight=False,
        )
        console.print()

    table = Table(title=f"{evaluation.numel() - len(evaluation)} tokens of stories no model has seen")
    for column in ("", "runtime", "cache bytes per token", "perplexity", "tokens/s"):
        table.add_column(column)
    before = decoders[BEST].metadata["original_cache_bytes_per_token"]
    base = perplexity(lambda ids: original(ids, use_cache=False).logits, evaluation).value
    table.add_row("original", "PyTorch", f"{before}", f"{base:.3f}", speed(written["original"]))
    found = {}
    for name, decoder in decoders.items():
        found[name] = perplexity(lambda ids, d=decoder: torch.from_numpy(d.logits(ids.numpy())), evaluation).value
        cache = f"{decoder.cache_bytes_per_token} ({decoder.cache_bytes_per_token / before:.0%})"
        table.add_row(name, "ONNX Runtime", cache, f"{found[name]:.3f}", speed(written[name]))
    console.print(table)
    console.print(
        f"The same cache, {RATIO:.0%} of the original's: perplexity "
        + ", ".join(f"x{value / base:.2f} by {name}" for name, value in found.items())
        + ".",
        highlight=False,
    )
    program = os.path.relpath(Path(sys.executable).parent / "mla-compile")
    console.print(f"Try it: {program} run {paths[BEST]} --prompt '{PROMPTS[0]}'", highlight=False)
    return 0 if found[BEST] < found["fisher"] < found["mha2mla"] else 1


if __name__ == "__main__":
    sys.exit(main())
