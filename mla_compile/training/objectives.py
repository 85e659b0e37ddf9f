"""What training comes closer to: the text, a teacher's predictions, the original's attention outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from mla_compile.passes.moved import moved_graph
from mla_compile.program import Program
from mla_compile.runtime.module import LatentModel
from mla_compile.text.evaluate import Scorer
from mla_compile.training.graphs import matched, recomputed, with_attention_outputs
from mla_compile.training.recipe import ATTENTION, DIVERGENCE, NEXT_TOKEN

__all__ = ["Student", "Teacher", "TeacherAnswers"]


@dataclass(frozen=True)
class TeacherAnswers:
    """What a teacher says of a batch.

    Attributes:
        predictions: Its logits ``[batch, length, vocabulary]``, if they are asked for.
        attended: Its output projections of attention ``[batch, length, width]``, layer by layer, likewise.
    """

    predictions: Tensor | None = None
    attended: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Teacher:
    """A model that is learned from.

    Attributes:
        score: Token ids to logits.
        attend: Token ids to output projections of attention; None where they are not asked for.
    """

    score: Scorer
    attend: Scorer | None = None

    @classmethod
    def of(cls, program: Program, device: torch.device, *, layers: bool) -> Teacher:
        """Prepare a model on a device; its weights are never changed.

        Args:
            program: The model.
            device: Where it runs.
            layers: Whether attention outputs are asked for.

        Raises:
            RefusedError: They are, and cannot be found.
        """
        module = moved_graph(program.flat_module(), device)
        attending = moved_graph(with_attention_outputs(program), device) if layers else None
        return cls(
            lambda ids: module(*program.inputs(ids)),
            None if attending is None else lambda ids: attending(*program.inputs(ids)),
        )

    @torch.no_grad()
    def answer(self, ids: Tensor, parts: Collection[str]) -> TeacherAnswers:
        """What these parts of an objective need to know of a batch ``[batch, length]``."""
        return TeacherAnswers(
            self.score(ids) if DIVERGENCE in parts else None,
            tuple(x.float() for x in self.attend(ids)) if ATTENTION in parts and self.attend is not None else (),
        )


class Student(nn.Module):
    """A converted model whose results are its losses.

    Args:
        model: The model.
        matching: Whether it will be asked to match attention outputs.
        recompute: Whether to compute activations twice instead of keeping them.

    Raises:
        RefusedError: It will be asked to match attention outputs, and they cannot be found.
    """

    def __init__(self, model: LatentModel, *, matching: bool, recompute: bool) -> None:
        super().__init__()
        graph = model.graph
        self.model = LatentModel(recomputed(graph), model.rows, model.windows) if recompute else model
        # In a tuple, so that parameters have one name: both graphs share them.
        self._matched: tuple[fx.GraphModule, ...] = (matched(graph),) if matching else ()

    @property
    def graphs(self) -> tuple[nn.Module, ...]:
        """Everything that takes weights."""
        return (self.model.graph, *self._matched)

    def forward(self, ids: Tensor, parts: Collection[str], wanted: TeacherAnswers) -> Tensor:
        """Losses of a batch ``[batch, length]``, one of every part, in nats per token but for matching.

        All are means over windows, so that those of a batch are the means of those of its pieces.
        """
        found = {}
        if {NEXT_TOKEN, DIVERGENCE} & {*parts}:
            logits = self.model(ids).logits
            if NEXT_TOKEN in parts:
                found[NEXT_TOKEN] = _mean(_surprise, logits, ids)
            if wanted.predictions is not None:
                found[DIVERGENCE] = _mean(_divergence, logits, wanted.predictions)
        if ATTENTION in parts:
            pairs = zip(self._attended(ids, wanted.attended), wanted.attended, strict=True)
            found[ATTENTION] = torch.stack([_mismatch(got, want, len(ids)) for got, want in pairs]).mean()
        return torch.stack([found[part] for part in parts])

    def _attended(self, ids: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Output projections of attention where the layers before were the original's."""
        (graph,) = self._matched
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        found: tuple[Tensor, ...] = graph(
            ids, torch.ones_like(ids), positions, *self.model.empty_cache(len(ids)), *given
        )
        return found


def _mean(loss: Callable[[Tensor, Tensor], Tensor], *tensors: Tensor) -> Tensor:
    """Mean of a loss over windows, one of which is computed at a time, and again for its gradient.

    Logits of a batch may be gigabytes, and what a loss makes of them several times as much.
    """
    windows = zip(*(tensor.split(1) for tensor in tensors), strict=True)
    return torch.stack([checkpoint(loss, *w, use_reentrant=False, preserve_rng_state=False) for w in windows]).mean()


def _surprise(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p(next token) in nats per token."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def _mismatch(got: Tensor, wanted: Tensor, windows: int) -> Tensor:
    """Squares of errors over squares of what is wanted, of every window; their mean."""
    got, wanted = (x.float().reshape(windows, -1) for x in (got, wanted))  # products may have flattened them
    return ((got - wanted).square().sum(1) / wanted.square().sum(1)).mean()


def _divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(expected || logits) in nats per token."""
    got, wanted = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
    weights = wanted.exp()
    # A token may be ruled out by -inf.
    return torch.where(weights > 0, weights * (wanted - got), 0.0).sum() / logits[..., 0].numel()
