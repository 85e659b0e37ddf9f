"""A converted PyTorch module behind the interface that generates text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mla_compile.runtime.generate import Ids, checked_step
from mla_compile.runtime.module import LatentModel

__all__ = ["TorchDecoder"]


class TorchDecoder:
    """A :class:`LatentModel` behind the decoder interface of :mod:`mla_compile.runtime.generate`.

    Args:
        model: The model.
        name: What the user calls it.

    Attributes:
        vocabulary: How many logits a token has.
        known_tokens: How many token ids the model reads.
    """

    def __init__(self, model: LatentModel, name: str = "the model") -> None:
        self._model, self._name = model, name
        self.vocabulary, self.known_tokens = model.vocabulary, model.known_tokens

    def empty_cache(self, batch: int, tokens: int | None = None) -> tuple[Tensor, ...]:
        """A cache of no tokens, which grows by itself."""
        return self._model.empty_cache(batch)

    def step(
        self, ids: Ids, attention_mask: Ids, position_ids: Ids, cache: tuple[Tensor, ...]
    ) -> tuple[np.ndarray, tuple[Tensor, ...]]:
        """Run new tokens; see :class:`~mla_compile.runtime.generate.Decoder`.

        Raises:
            UsageError: There are none, sizes do not fit, or a token is unknown.
        """
        inputs = checked_step(self._name, self.known_tokens, ids, attention_mask, position_ids)
        given = (torch.from_numpy(np.ascontiguousarray(x)).to(self._model.device) for x in inputs)
        with torch.inference_mode():
            result = self._model(*given, past=cache)
        return result.logits.float().cpu().numpy(), result.cache
