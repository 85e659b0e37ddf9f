"""``mla-compile eval``: perplexity and cache size of any model the compiler reads or writes, on the user's text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_compile import frontend
from mla_compile.artifacts import is_converted_folder, read_folder
from mla_compile.corpus import load_tokenizer, read_documents, token_windows, tokenize
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
        score, cache_bytes, limit, folder = _open(model, tokenizer)
    length = seq_len or longest_window(score, limit)
    windows = token_windows(tokenize(documents, load_tokenizer(tokenizer or folder)), length, max_tokens)
    result = _score("evaluate", score, cache_bytes, windows, stages)
    if original is not None:
        with stages.stage("load original"):
            score, cache_bytes, _, _ = _open(original, tokenizer)
        result["original"] = _score("evaluate original", score, cache_bytes, windows, stages)
    return result


def _open(name: str, tokenizer: str | None) -> tuple[Scorer, int | None, int | None, str | None]:
    """Return a model's scorer, cache bytes per token, longest sequence and tokenizer folder."""
    if Path(name).suffix == ".onnx":
        decoder = OnnxDecoder(name)
        limit = decoder.metadata.get("max_position_embeddings")
        return (
            lambda ids: torch.from_numpy(decoder.logits(ids.numpy())),
            decoder.cache_bytes_per_token,
            limit,
            str(Path(name).absolute().parent),
        )
    if is_converted_folder(Path(name)):
        model = read_folder(Path(name))
        config = Path(name) / "config.json"
        limit = json.loads(config.read_text("utf-8")).get("max_position_embeddings") if config.is_file() else None
        cache_bytes = sum(model.rows) * torch.float32.itemsize
        return lambda ids: model(ids).logits, cache_bytes, limit, name
    program = frontend.load_program(name, tokenizer=tokenizer)
    found = recognise(program)
    known = found.sites and not found.rejections
    original_bytes = sum(s.elements_per_token for s in found.sites) * torch.float32.itemsize if known else None
    return original_scorer(program), original_bytes, program.max_positions, program.assets.folder


def _score(name: str, score: Scorer, cache_bytes: int | None, windows: Tensor, stages: Stages) -> dict[str, Any]:
    steps = math.ceil(len(windows) / _BATCH)
    found = perplexity(score, windows, _BATCH, progress=lambda batches: stages.each(name, batches, steps))
    return {
        "perplexity": found.value,
        "loss": found.loss,
        "tokens": found.tokens,
        "seq_len": windows.shape[1],
        "cache_bytes_per_token": cache_bytes,
    }
