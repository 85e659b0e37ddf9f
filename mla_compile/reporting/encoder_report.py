"""What the conversion of an encoder did, as data: there is no cache to count, so weights and multiplications are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mla_compile.plan import LatentPlan
from mla_compile.progress import StageTiming
from mla_compile.report import environment, summarise_site
from mla_compile.site import AttentionSite, Rejection

__all__ = ["EncoderReport", "EncoderVerification", "projection_multiplications"]


@dataclass(frozen=True, slots=True)
class EncoderVerification:
    """Checks of a conversion on random inputs, padded where the model takes a padding mask.

    Relative errors are ``max |difference| / max |output|``, the worst of all outputs.

    Attributes:
        rewrite_error: The same rewrite with nothing left out, against the original model.
        lowering_error: ONNX Runtime against the converted PyTorch module; None without an ONNX file.
        conversion_error: The converted model against the original: what the smaller rank costs.
        tokens: Tokens compared.
    """

    rewrite_error: float
    lowering_error: float | None
    conversion_error: float
    tokens: int


def projection_multiplications(site: AttentionSite, plan: LatentPlan, width: int) -> tuple[int, int]:
    """Multiplications per token that make keys and values, before and after.

    Args:
        site: The layer.
        plan: Its latent shape.
        width: Input width of its projections.
    """
    heads, nope = site.kv_heads, site.qk_dim - plan.rope_dims
    row = plan.kv_rank + plan.rope_groups * plan.rope_dims
    return site.elements_per_token * width, row * width + plan.kv_rank * heads * (nope + site.v_dim)


@dataclass(frozen=True)
class EncoderReport:
    """Everything the conversion of an encoder did.

    Attributes:
        source: The model.
        config: Settings, defaults filled in.
        sites: The converted layers.
        plans: Their latent shapes.
        kept: Layers that stay as they are, and why.
        parameters: Numbers in the model's weights, before and after.
        multiplications: Per token, to make keys and values in all converted layers, before and after.
        stages: Times and memory peaks.
        verification: Checks, if they were run.
        warnings: What the user should know.
        artifacts: Written files and their sizes in bytes.
        in_memory: Whether the model was handed over in Python, and ``source`` is its class.
    """

    source: str
    config: Mapping[str, Any]
    sites: tuple[AttentionSite, ...]
    plans: tuple[LatentPlan, ...]
    kept: tuple[Rejection, ...]
    parameters: tuple[int, int]
    multiplications: tuple[int, int]
    stages: tuple[StageTiming, ...] = ()
    verification: EncoderVerification | None = None
    warnings: tuple[str, ...] = ()
    artifacts: Mapping[str, int] = field(default_factory=dict)
    in_memory: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        before, after = self.parameters
        return {
            "schema_version": 1,
            "kind": "encoder",
            "source": self.source,
            "in_memory": self.in_memory,
            "environment": environment(),
            "config": dict(self.config),
            "cache": None,
            "parameters": {"before": before, "after": after, "ratio": after / before},
            "key_value_multiplications_per_token": {
                "before": self.multiplications[0],
                "after": self.multiplications[1],
                "ratio": self.multiplications[1] / self.multiplications[0],
            },
            "layers": [
                {**summarise_site(s), **dataclasses.asdict(p)} for s, p in zip(self.sites, self.plans, strict=True)
            ],
            "kept": [summarise_site(r) for r in self.kept],
            "verification": dataclasses.asdict(self.verification) if self.verification else None,
            "stages": [dataclasses.asdict(s) for s in self.stages],
            "warnings": list(self.warnings),
            "artifacts": dict(self.artifacts),
        }

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        """A summary of a few lines."""
        kept = f", {len(self.kept)} kept as they are" if self.kept else ""
        lines = [
            f"{self.source}: {len(self.plans)} attention layers converted{kept}; an encoder has no cache",
            f"parameters: {self.parameters[0]} -> {self.parameters[1]}",
            f"multiplications per token for keys and values: {self.multiplications[0]} -> {self.multiplications[1]}",
        ]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])
