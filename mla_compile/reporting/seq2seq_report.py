"""What the conversion of an encoder-decoder did, as data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mla_compile.plan import LatentPlan, cache_elements
from mla_compile.progress import StageTiming
from mla_compile.report import environment, summarise_site
from mla_compile.reporting.encoder_report import EncoderVerification
from mla_compile.site import AttentionSite, Rejection

__all__ = ["Seq2SeqReport", "Seq2SeqVerification"]

_BYTES = 4
"""Of a float32."""


@dataclass(frozen=True, slots=True)
class Seq2SeqVerification(EncoderVerification):
    """Checks of a conversion on random inputs; errors are relative to the largest logit.

    Attributes:
        decode_error: The converted decoder in pieces, against all its tokens at once.
    """

    decode_error: float


@dataclass(frozen=True)
class Seq2SeqReport:
    """Everything the conversion of an encoder-decoder did.

    Attributes:
        source: The model.
        config: Settings, defaults filled in.
        sites: The decoder's self-attention layers.
        plans: Their latent shapes: rows per token of the decoder.
        cross: The decoder's cross attention layers.
        cross_plans: Their latent shapes: rows per token of the encoder.
        kept: Layers of the encoder, which cache nothing and stay as they are.
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
    cross: tuple[AttentionSite, ...]
    cross_plans: tuple[LatentPlan, ...]
    kept: tuple[Rejection, ...]
    stages: tuple[StageTiming, ...] = ()
    verification: Seq2SeqVerification | None = None
    warnings: tuple[str, ...] = ()
    artifacts: Mapping[str, int] = field(default_factory=dict)
    in_memory: bool = False

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Cached bytes per token of the decoder, before and after."""
        before, after = cache_elements(self.plans)
        return _BYTES * before, _BYTES * after

    @property
    def cross_cache_bytes(self) -> tuple[int, int]:
        """Cached bytes per token of the encoder, before and after."""
        before, after = cache_elements(self.cross_plans)
        return _BYTES * before, _BYTES * after

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        (before, after), (cross_before, cross_after) = self.cache_bytes, self.cross_cache_bytes
        layers = [*zip(self.sites, self.plans, strict=True), *zip(self.cross, self.cross_plans, strict=True)]
        return {
            "schema_version": 1,
            "kind": "encoder-decoder",
            "source": self.source,
            "in_memory": self.in_memory,
            "environment": environment(),
            "config": dict(self.config),
            "cache": {
                "bytes_per_token_before": before,
                "bytes_per_token_after": after,
                "ratio": after / before,
            },
            "cross_cache": {
                "bytes_per_encoder_token_before": cross_before,
                "bytes_per_encoder_token_after": cross_after,
                "ratio": cross_after / cross_before,
            },
            "layers": [
                {**summarise_site(s), **dataclasses.asdict(p), "elements_after": p.elements_after}
                for s, p in sorted(layers, key=lambda layer: layer[0].index)
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
        lines = [
            f"{self.source}: {len(self.plans)} self and {len(self.cross_plans)} cross attention layers converted",
            f"cache: {self.cache_bytes[0]} -> {self.cache_bytes[1]} bytes per token of the decoder",
            f"cross cache: {self.cross_cache_bytes[0]} -> {self.cross_cache_bytes[1]} bytes per token of the encoder",
        ]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])
