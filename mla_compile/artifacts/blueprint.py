"""What a DeepSeek checkpoint has to know of a conversion besides its weights: read of its report, stored or new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mla_compile.deepseek import DeepSeekShape
from mla_compile.errors import UsageError
from mla_compile.passes.emit import holder_name

__all__ = ["AttentionShape", "Blueprint", "read_blueprint"]


@dataclass(frozen=True)
class AttentionShape:
    """One converted attention layer.

    Attributes:
        path: Module path.
        index: Position among the attention layers of the model, from 0.
        heads: Query heads.
        v_dim: Channels of a value head.
        scale: Factor of ``q . k`` in logits.
        frequencies: Radians per position of its rope components, in their order.
    """

    path: str
    index: int
    heads: int
    v_dim: int
    scale: float
    frequencies: tuple[float, ...]

    @property
    def holder(self) -> str:
        """What names of its latent weights begin with."""
        return f"{holder_name(self.path, self.index)}."


@dataclass(frozen=True)
class Blueprint:
    """A conversion, as far as a checkpoint depends on it.

    Attributes:
        source: The original.
        attentions: Its attention layers.
        shape: What all of them have in common.
        preset: The setting ``preset``.
        q_rank: Rank of queries, if they were given one.
    """

    source: str
    attentions: tuple[AttentionShape, ...]
    shape: DeepSeekShape
    preset: str
    q_rank: int | None


def read_blueprint(report: Mapping[str, Any]) -> Blueprint:
    """Take from a report what a checkpoint depends on.

    Args:
        report: Content of a ``report.json``, see :meth:`mla_compile.report.Report.to_dict`.

    Raises:
        UsageError: The model was converted with another layout.
    """
    if report["deepseek"] is None:
        raise UsageError(
            "The model was converted with the layout free, which a DeepSeek checkpoint cannot express.",
            "Convert it with --layout deepseek.",
        )
    attentions = tuple(
        AttentionShape(
            path=str(layer["path"]),
            index=int(layer["index"]),
            heads=int(layer["heads"]),
            v_dim=int(layer["v_dim"]),
            scale=float(layer["scale"]),
            frequencies=tuple(map(float, layer["rope_frequencies"])),
        )
        for layer in report["layers"]
    )
    settings = report["config"]
    return Blueprint(
        source=str(report["source"]),
        attentions=attentions,
        shape=DeepSeekShape(**report["deepseek"]),
        preset=settings.get("preset", "none"),
        q_rank=settings.get("q_rank"),
    )
