"""The converted model as a PyTorch module: callable, trainable, with an explicit latent cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LatentModel", "LatentOutput", "positions_from_mask"]


@dataclass(frozen=True)
class LatentOutput:
    """What one step returns.

    Attributes:
        logits: ``[batch, new, vocabulary]``.
        cache: One ``[batch, past + new, row]`` tensor per layer; pass it back as ``past``.
    """

    logits: Tensor
    cache: tuple[Tensor, ...]


def positions_from_mask(attention_mask: Tensor, new: int) -> Tensor:
    """Position of each of the last ``new`` tokens: how many real tokens precede it.

    Args:
        attention_mask: ``[batch, total]``, non-zero for real tokens; padding may be on either side.
        new: Number of new tokens.

    Returns:
        ``[batch, new]`` int64; padding gets a harmless position of 0 or more.
    """
    return ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -new:]


class LatentModel(nn.Module):
    """A converted causal language model.

    Args:
        graph: Module ``(input_ids, attention_mask, position_ids, *past) -> (logits, *present)``.
        rows: Numbers one token adds to the cache, per layer.
    """

    def __init__(self, graph: nn.Module, rows: Sequence[int]) -> None:
        super().__init__()
        self.graph = graph
        self.rows = tuple(rows)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
    ) -> LatentOutput:
        """Run the model on new tokens.

        Args:
            input_ids: ``[batch, new]`` token ids.
            attention_mask: ``[batch, past + new]``, non-zero for real tokens; all real by default.
            position_ids: ``[batch, new]``; counted from the mask by default.
            past: The cache of earlier tokens; empty by default.

        Returns:
            Logits of the new tokens and the grown cache.
        """
        batch, new = input_ids.shape
        past = tuple(past) if past is not None else self.empty_cache(batch)
        if attention_mask is None:
            attention_mask = torch.ones(batch, past[0].shape[1] + new, dtype=torch.long, device=input_ids.device)
        if position_ids is None:
            position_ids = positions_from_mask(attention_mask, new)
        logits, *present = self.graph(input_ids, attention_mask, position_ids, *past)
        return LatentOutput(logits, tuple(present))

    def empty_cache(self, batch: int) -> tuple[Tensor, ...]:
        """A cache of no tokens."""
        like = next(p for p in self.parameters() if p.is_floating_point())
        return tuple(like.new_empty(batch, 0, row).detach() for row in self.rows)
