"""``mla-compile eval``: perplexity and cache size of any model the compiler reads or writes, on the user's text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_compile import frontend
from mla_compile.artifacts import is_converted_folder, read_folder
from mla_compile.corpus import check_vocabulary, load_tokenizer, read_documents, token_windows, tokenize
from mla_compile.errors import UsageError
from mla_compile.evaluate import Scorer, longest_window, original_scorer, perplexity
from mla_compile.passes.recognise import recognise
from mla_compile.progress import Display, Stages
from mla_compile.runtime.onnx_session import OnnxDecoder

__all__ = ["measure"]

_BATCH = 8


def measure(
    model: str,
    text: Path,
    *,
    original: str | None = None,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    tokenizer: str | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Measure a model, and optionally the original beside it, on the same windows.

    The text is one stream of documents, each led by the begin token, cut into consecutive windows; every token of a
    window but the first is scored once.

    Args:
        model: An ONNX file, archive, Hugging Face folder or hub id.
        text: The text file.
        original: The unconverted model.
        seq_len: Tokens per window; the model's limit, at most 512, by default.
        max_tokens: Measure on at most this many tokens.
        tokenizer: Folder of the tokenizer, if the model has none.
        display: Shows progress.

    Returns:
        ``perplexity``, ``loss``, ``tokens``, ``seq_len`` and ``cache_bytes_per_token`` (None where attention was not
        recognised), and the same under ``original``.
    """
    stages = Stages(display)
    documents = read_documents(text)
    with stages.stage("load"):
        opened = _open(model, tokenizer)
    length = seq_len or longest_window(opened.score, opened.longest)
    windows = token_windows(tokenize(documents, load_tokenizer(tokenizer or opened.tokenizer)), length, max_tokens)
    result = _score("evaluate", opened, windows, stages)
    if original is not None:
        with stages.stage("load original"):
            unconverted = _open(original, tokenizer)
        result["original"] = _score("evaluate original", unconverted, windows, stages)
    return result


@dataclass(frozen=True)
class _Opened:
    """A model to measure.

    Attributes:
        name: What the user called it.
        score: Token ids to logits.
        cache_bytes: Cache bytes per token; None where attention was not recognised.
        longest: Longest sequence, if the model says.
        vocabulary: How many token ids it knows.
        tokenizer: Where its tokenizer is.
    """

    name: str
    score: Scorer
    cache_bytes: int | None
    longest: int | None
    vocabulary: int
    tokenizer: str | None


def _open(name: str, tokenizer: str | None) -> _Opened:
    path = Path(name)
    if path.suffix == ".onnx":
        decoder = OnnxDecoder(name)
        return _Opened(
            name,
            lambda ids: torch.from_numpy(decoder.logits(ids.numpy())),
            decoder.cache_bytes_per_token,
            decoder.metadata.get("max_position_embeddings"),
            decoder.vocabulary,
            str(path.absolute().parent),
        )
    if is_converted_folder(path):
        model = read_folder(path)
        config = json.loads((path / "config.json").read_text("utf-8")) if (path / "config.json").is_file() else {}
        longest = config.get("max_position_embeddings")
        cache_bytes = sum(model.rows) * torch.float32.itemsize
        with torch.inference_mode():
            vocabulary = model(torch.zeros(1, 1, dtype=torch.long)).logits.shape[-1]
        return _Opened(name, lambda ids: model(ids).logits, cache_bytes, longest, vocabulary, name)
    program = frontend.load_program(name, tokenizer=tokenizer)
    found = recognise(program)
    known = found.sites and not found.rejections
    original_bytes = sum(s.elements_per_token for s in found.sites) * torch.float32.itemsize if known else None
    score, folder = original_scorer(program), program.assets.folder
    return _Opened(name, score, original_bytes, program.max_positions, program.vocabulary, folder)


def _score(stage: str, model: _Opened, windows: Tensor, stages: Stages) -> dict[str, Any]:
    check_vocabulary(int(windows.max()), model.vocabulary, model.name)
    length = windows.shape[1]
    longest = longest_window(model.score, model.longest, length)
    if longest < length:
        raise UsageError(
            f"Windows of {length} tokens are longer than '{model.name}' can run.", f"Use --seq-len {longest} or less."
        )
    steps = math.ceil(len(windows) / _BATCH)
    found = perplexity(model.score, windows, _BATCH, progress=lambda batches: stages.each(stage, batches, steps))
    return {
        "perplexity": found.value,
        "loss": found.loss,
        "tokens": found.tokens,
        "seq_len": length,
        "cache_bytes_per_token": model.cache_bytes,
    }
