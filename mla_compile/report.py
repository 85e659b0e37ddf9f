"""What a conversion did, as data: rendered by the command line, stored as ``report.json``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mla_compile.cost import MACHINES, DecodeStep, decode_costs, summed_costs
from mla_compile.deepseek import DeepSeekShape
from mla_compile.plan import LatentPlan, cache_elements
from mla_compile.progress import StageTiming
from mla_compile.runtime.onnx_halves import halves_bytes
from mla_compile.runtime.onnx_quantised import quantised_bytes
from mla_compile.site import AttentionSite, Kind, Rejection

__all__ = [
    "NO_GAIN",
    "CheckpointFacts",
    "LayerError",
    "LayerForecast",
    "Polish",
    "Quality",
    "Report",
    "Training",
    "TrainingPoint",
    "Verification",
    "environment",
    "summarise_site",
    "text_kind",
]

_CONTEXT, _SHARES = 16384, (32, 4, 1)
"""Tokens in the cache for which the time of a step is estimated, or the model's limit where that is less; and parts."""
_PACKAGES = ("mla-compile", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")


@dataclass(frozen=True, slots=True)
class Verification:
    """Checks of a conversion; relative errors are ``max |difference| / max |logit|``.

    Attributes:
        rewrite_error: The same rewrite with nothing left out, against the original model.
        decode_error: The converted model token by token and in chunks, against all at once.
        lowering_error: ONNX Runtime against the converted PyTorch module; None without an ONNX file.
        lowering_greedy: Equal greedy tokens of the two, as a fraction; None without an ONNX file.
        conversion_error: The converted model against the original: what the smaller cache costs.
        conversion_greedy: Equal greedy tokens of the two, as a fraction.
        cache_bytes_per_token: Counted from the cache tensors of a real run.
        tokens: Tokens compared.
        text: Whether the tokens came from the user's text (else random ids).
        engine_error: A TensorRT engine against ONNX Runtime; None without an engine.
        quantisation_error: The converted module with rows rounded as a quantised cache rounds them, which is then what
            ONNX Runtime is compared with, against the same without; None where the cache is not quantised.
        rounding: What roundings of float16 or bfloat16 change of most tokens in the original and in the converted
            model, against either in float32, in which all other models above are compared then; None for float32.
        lowering_copy: Whether ``lowering_error`` is of a float32 copy of the ONNX file.
        lowering_rounding: What ONNX Runtime's own roundings of a float16 file change; None for other files.
    """

    rewrite_error: float
    decode_error: float
    lowering_error: float | None
    lowering_greedy: float | None
    conversion_error: float
    conversion_greedy: float
    cache_bytes_per_token: int
    tokens: int
    text: bool
    engine_error: float | None = None
    quantisation_error: float | None = None
    rounding: tuple[float, float] | None = None
    lowering_copy: bool = False
    lowering_rounding: float | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity on windows of a text.

    Attributes:
        original: Before.
        converted: After.
        tokens: Scored tokens.
        held_out: Whether the windows were kept out of calibration.
        sampled: Whether the model wrote the text itself.
    """

    original: float
    converted: float
    tokens: int
    held_out: bool
    sampled: bool = False

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.converted / self.original

    @property
    def text(self) -> str:
        """The text's kind, as :func:`text_kind` says it."""
        return text_kind(dataclasses.asdict(self))


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far one converted layer is from the original's, all other layers being the original's.

    Attributes:
        output: Root of the mean squared error of its attention outputs, over the root of their mean square.
        loss: What that does to the loss, in nats per token to second order: ``E (sum_h dL/do_h . error_h)^2 / 2``.
            None where gradients were not wanted.
    """

    output: float
    loss: float | None


@dataclass(frozen=True, slots=True)
class LayerForecast:
    """What rotates in a converted layer, and what the conversion should cost by the statistics it was chosen by.

    Attributes:
        rope_frequencies: Radians per position of the components of rope keys, one key after the other.
        rope_own: Whether each carries pairs of that frequency only; others have pairs of other frequencies attached.
        predicted_loss: Loss of rope and latent together, in nats per token to second order; None where the method does
            not count in these units.
        spectrum: Ranks, and what a latent of each would leave out: as shares of all that it could carry, by the
            method's own measure. Empty where the method does not know.
    """

    rope_frequencies: tuple[float, ...]
    rope_own: tuple[bool, ...]
    predicted_loss: float | None = None
    spectrum: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The forecast as JSON-able data."""
        return {
            "rope_frequencies": list(self.rope_frequencies),
            "rope_own": list(self.rope_own),
            "predicted_loss": self.predicted_loss,
            "spectrum": [list(point) for point in self.spectrum],
        }


@dataclass(frozen=True, slots=True)
class Polish:
    """What training the new matrices did; divergences are KL(original || converted) in nats per token.

    Attributes:
        steps: Steps that were taken.
        before: Divergence on calibration text kept out of training, before.
        after: The same of the weights that were chosen in the end.
    """

    steps: int
    before: float
    after: float


NO_GAIN = (
    "no evaluation while training was closer to its objective than the conversion was: the weights of step 0 are kept, "
    "as if there had been none (more --tokens or a smaller --rate may gain something)"
)
"""Said of a training whose best step is 0."""


@dataclass(frozen=True, slots=True)
class TrainingPoint:
    """A point of a training's curve.

    Attributes:
        step: Steps that were taken.
        tokens: Tokens trained on.
        loss: Mean of what those steps since the point before came closer to, in its unit; None at step 0.
        held_out: Loss of the next token on text kept out of training, in nats per token.
        objective: What is trained towards, on the same text; the weights at its least are chosen. In nats per token for
            the next token, which is ``held_out`` again, and for a teacher's predictions; for attention outputs the
            squares of errors over those of the outputs; for a mixture the weighted sum.
    """

    step: int
    tokens: int
    loss: float | None
    held_out: float
    objective: float


@dataclass(frozen=True, slots=True)
class Training:
    """What fine-tuning did; losses are of the next token on text kept out of training, in nats per token.

    Attributes:
        objective: What was trained towards.
        train: What was trained.
        steps: Steps that were taken.
        tokens: Tokens trained on.
        best_step: The step whose weights were chosen.
        before: Loss at step 0.
        after: Loss at the chosen step; of weights that are stored in float16 or bfloat16, as they are stored.
        held_out_tokens: Tokens these are means over.
        curve: All that was measured.
    """

    objective: str
    train: str
    steps: int
    tokens: int
    best_step: int
    before: float
    after: float
    held_out_tokens: int
    curve: tuple[TrainingPoint, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of it."""
        return (NO_GAIN,) if self.best_step == 0 else ()


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """A stock DeepSeek-V3 checkpoint that was written.

    Attributes:
        latent: Length of its latent, with the zeros that fill it up.
        rope: Length of its rope key, likewise.
        cache_bytes_per_token: What stock code caches in the type of the weights.
        norm_error: Bound of the relative error that the norm of the latent makes, for any text.
        error: Stock transformers against the converted PyTorch module: ``max |difference| / max |logit|``.
        greedy: Equal greedy tokens of the two, as a fraction.
        caveats: Why engines other than transformers would compute something else.
        cache_bytes_measured: What its cache held in stock transformers, per token.
        norm_error_measured: The error of that norm on the text that was compared on.
        without_biases: Divergence of predictions in nats per token, on that text, where an engine leaves the biases of
            attention out; None where there are none.
        dtype: Type of its weights.
        rounding_error: What rounding weights to it changes, likewise; None in float32, in which ``error`` is measured.
        llama_cpp_error: llama.cpp against the converted module, likewise; None where it did not run.
    """

    latent: int
    rope: int
    cache_bytes_per_token: int
    norm_error: float
    error: float
    greedy: float
    caveats: tuple[str, ...] = ()
    cache_bytes_measured: float | None = None
    norm_error_measured: float | None = None
    without_biases: float | None = None
    dtype: str = "float32"
    rounding_error: float | None = None
    llama_cpp_error: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything a conversion did.

    Attributes:
        source: The model.
        config: Settings, defaults filled in.
        sites: The converted layers.
        plans: Their latent shapes.
        kept: Layers that were not converted, and why.
        widths: Input width of the converted layers' projections, where the time of a step is to be estimated.
        bytes_per_element: Size of one cached number.
        selection: The rotary selection used, or the method where that chooses components itself.
        stages: Times and memory peaks.
        verification: Checks, if they were run.
        quality: Perplexities, if there was text.
        forecasts: What rotates in every converted layer, and what that should cost.
        deepseek: What a DeepSeek checkpoint says of all layers, if that layout was asked for.
        checkpoint: The DeepSeek checkpoint that was written, if one was.
        layer_errors: What every converted layer costs by itself, if there was text.
        polish: What polishing did, if there was any.
        training: What fine-tuning did, if there was any; quality was measured after it, everything else before.
        warnings: What the user should know.
        artifacts: Written files and their sizes in bytes.
        source_bytes_per_element: Size of one number of the original's cache, if it is another.
        in_memory: Whether the model was handed over in Python, and ``source`` is its class.
        target: What files were written for: ``tensorrt``, or empty.
        max_positions: Longest sequence that the model takes; None if it does not say.
    """

    source: str
    config: Mapping[str, Any]
    sites: tuple[AttentionSite, ...]
    plans: tuple[LatentPlan, ...]
    bytes_per_element: int
    selection: str
    stages: tuple[StageTiming, ...] = ()
    verification: Verification | None = None
    quality: Quality | None = None
    forecasts: tuple[LayerForecast, ...] = ()
    deepseek: DeepSeekShape | None = None
    checkpoint: CheckpointFacts | None = None
    layer_errors: tuple[LayerError, ...] = ()
    polish: Polish | None = None
    training: Training | None = None
    warnings: tuple[str, ...] = ()
    artifacts: Mapping[str, int] = field(default_factory=dict)
    kept: tuple[Rejection, ...] = ()
    source_bytes_per_element: int | None = None
    widths: tuple[int, ...] = ()
    in_memory: bool = False
    target: Literal["", "tensorrt"] = ""
    max_positions: int | None = None

    @property
    def _kept_elements(self) -> int:
        return sum(r.plain.elements_per_token for r in self.kept if r.plain is not None)

    @property
    def _measured_layers(self) -> list[dict[str, float | None] | None]:
        return [dataclasses.asdict(e) for e in self.layer_errors] or [None] * len(self.sites)

    @property
    def _forecast_layers(self) -> list[dict[str, Any]]:
        return [f.to_dict() for f in self.forecasts] or [{} for _ in self.sites]

    @property
    def _steps(self) -> list[dict[str, Any]]:
        """Decoding steps of all converted layers together, estimated."""
        longest = min(_CONTEXT, self.max_positions or _CONTEXT)
        contexts = sorted({max(1, longest // share) for share in _SHARES})
        steps = [DecodeStep(machine, context) for machine in MACHINES.values() for context in contexts]
        costs = [summed_costs(decode_costs(self.sites, self.plans, self.widths, step), step) for step in steps]
        return [dataclasses.asdict(step) | cost for step, cost in zip(steps, costs, strict=True)]

    @property
    def cache_bytes_before(self) -> int:
        """Bytes a plain KV cache adds per token."""
        itemsize = self.source_bytes_per_element or self.bytes_per_element
        return (cache_elements(self.plans)[0] + self._kept_elements) * itemsize

    @property
    def cache_bytes_after(self) -> int:
        """Bytes the latent cache, and the cache of layers that were kept, add per token; scales of codes included."""
        if self.config.get("cache_layout") == "genai":
            return halves_bytes([p.elements_after for p in self.plans])
        if self.config.get("cache_layout") == "paged":
            return 2 * cache_elements(self.plans)[1]
        if self.config.get("cache_type") == "int8":
            return quantised_bytes([p.elements_after for p in self.plans], [p.norm_scales for p in self.plans])
        return (cache_elements(self.plans)[1] + self._kept_elements) * self.bytes_per_element

    @property
    def windows(self) -> dict[int, int]:
        """Windows of the layers that have one, and how many layers have it; they cache no more than ``window - 1``."""
        masks = [s.mask for s in self.sites] + [r.plain.scores.mask for r in self.kept if r.plain is not None]
        return dict(Counter(m.window for m in masks if m.window is not None))

    @property
    def cache_ratio(self) -> float:
        """After over before."""
        return self.cache_bytes_after / self.cache_bytes_before

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "schema_version": 1,
            "source": self.source,
            "in_memory": self.in_memory,
            "target": self.target,
            "environment": environment(),
            "config": dict(self.config),
            "cache": {
                "bytes_per_token_before": self.cache_bytes_before,
                "bytes_per_token_after": self.cache_bytes_after,
                "ratio": self.cache_ratio,
                "layers_with_window": {str(window): layers for window, layers in self.windows.items()},
            },
            "selection": self.selection,
            "layers": [
                summarise_site(s)
                | dataclasses.asdict(p)
                | {"rope_frequencies_before": list(s.rope.inv_freq)}
                | forecast
                | {"elements_after": p.elements_after, "measured": measured}
                for s, p, forecast, measured in zip(
                    self.sites, self.plans, self._forecast_layers, self._measured_layers, strict=True
                )
            ],
            "decode_steps": self._steps if self.widths else [],
            "deepseek": dataclasses.asdict(self.deepseek) if self.deepseek else None,
            "checkpoint": dataclasses.asdict(self.checkpoint) if self.checkpoint else None,
            "kept": [summarise_site(r) for r in self.kept],
            "quality": dataclasses.asdict(self.quality) | {"ratio": self.quality.ratio} if self.quality else None,
            "polish": dataclasses.asdict(self.polish) if self.polish else None,
            "training": dataclasses.asdict(self.training) if self.training else None,
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
            f"{self.source}: {len(self.plans)} attention layers converted{kept}",
            f"cache: {self.cache_bytes_before} -> {self.cache_bytes_after} bytes per token ({self.cache_ratio:.2%})",
        ]
        for window, layers in self.windows.items():
            lines.append(f"window: {layers} layers see {window} tokens and cache no more than {window - 1}")
        if self.quality:
            lines.append(
                f"perplexity: {self.quality.original:.4f} -> {self.quality.converted:.4f} "
                f"({self.quality.tokens} {self.quality.text} tokens)"
            )
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def summarise_site(site: AttentionSite | Rejection) -> dict[str, Any]:
    """One recognised or rejected layer as a flat row."""
    if isinstance(site, Rejection):
        described = {} if site.site is None else summarise_site(site.site)
        found = {"index": site.index, "path": site.path, "rejected": site.code.value, "reason": site.reason} | described
        if site.plain is None:
            return found | {"kept": False}
        return found | {"kept": True, "elements_per_token": site.plain.elements_per_token}
    return {
        "index": site.index,
        "path": site.path,
        "kind": site.kind.value,
        "cache": _cache_in_words(site),
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "qk_dim": site.qk_dim,
        "v_dim": site.v_dim,
        "query": site.query.weight,
        "key": site.key.weight,
        "value": site.value.weight,
        "bias": site.query.biased or site.key.biased or site.value.biased,
        "rope": site.rope.layout,
        "rotary_dim": site.rope.rotary_dim,
        "rope_max_freq": max(site.rope.inv_freq, default=0.0),
        "rope_min_freq": min(site.rope.inv_freq, default=0.0),
        "rope_theta": site.rope.theta,
        "rope_slowing": list(site.rope.slowing),
        "scale": site.scale,
        "logit_scale": site.logit_scale,
        "logit_scales": None if site.logit_scales is None else list(site.logit_scales),
        "mask": str(site.kind) if site.kind == Kind.CROSS else str(site.mask),
        "query_norm": None if site.query.norm is None else str(site.query.norm),
        "key_norm": None if site.key.norm is None else str(site.key.norm),
        "value_norm": None if site.value.norm is None else str(site.value.norm),
        "softcap": site.softcap,
        "sinks": site.sinks,
        "alibi": site.slopes is not None,
        "elements_per_token": site.elements_per_token if site.kind == Kind.CAUSAL else 0,
        "elements_per_encoder_token": site.elements_per_token if site.kind == Kind.CROSS else 0,
        "error": site.error,
    }


def _cache_in_words(site: AttentionSite) -> str:
    """What a layer keeps between steps, if a plain cache is kept."""
    if site.kind == Kind.BIDIRECTIONAL:
        return "no cache"
    if site.kind == Kind.CROSS:
        return f"cross cache {site.elements_per_token} numbers per encoder token"
    return f"{site.elements_per_token} numbers per token"


def text_kind(quality: Mapping[str, Any]) -> str:
    """What text perplexity was measured on, in a word or two.

    Args:
        quality: Fields of :class:`Quality`, also of a report from before there were sampled texts.
    """
    kept = "held-out" if quality["held_out"] else "calibration"
    return f"{kept} sampled" if quality.get("sampled") else kept


def environment() -> dict[str, str]:
    """Versions that shape the result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
