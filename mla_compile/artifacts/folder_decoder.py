"""A converted folder as ``mla-compile run`` takes it: the PyTorch module, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_compile.artifacts.archives import read_folder
from mla_compile.artifacts.companions import read_assets
from mla_compile.runtime.generate import check_length
from mla_compile.runtime.module import cache_dtype
from mla_compile.runtime.torch_decoder import TorchDecoder

__all__ = ["FolderDecoder"]


class FolderDecoder(TorchDecoder):
    """A converted folder step by step, as :class:`~mla_compile.runtime.onnx_session.OnnxDecoder` is a file.

    Args:
        folder: A folder written by ``mla-compile convert MODEL --out FOLDER``.
        max_length: Tokens of a sequence at most, prompt and continuation.

    Attributes:
        metadata: The model's end token and longest sequence, as files have them.
        vocabulary: How many logits a token has.
        known_tokens: How many token ids the model reads.
        cache_bytes_per_token: Bytes one token of one sequence adds to the cache.

    Raises:
        LoadError: The folder is damaged.
    """

    def __init__(self, folder: Path, max_length: int | None = None) -> None:
        model = read_folder(folder)
        super().__init__(model, f"'{folder}'")
        assets = read_assets(folder)
        self._max_length = max_length
        self._elements, self._itemsize = model.cached_elements, cache_dtype(model.graph).itemsize
        self.metadata: Mapping[str, Any] = {
            "eos_token_id": assets.generation.get("eos_token_id"),
            "max_position_embeddings": assets.longest,
        }
        self.cache_bytes_per_token = sum(model.rows) * self._itemsize

    def cache_bytes(self, batch: int, tokens: int) -> int:
        """Bytes that the cache of so many tokens of each sequence takes: fewer per token beyond a layer's window."""
        return batch * self._elements(tokens) * self._itemsize

    def require_length(self, tokens: int) -> None:
        """Refuse sequences with this many cached tokens if that is too many.

        Raises:
            UsageError: These are more than ``max_length``.
        """
        check_length(tokens, self._max_length)
