"""A report as one page for people: self-contained HTML with drawings, made of ``report.json`` alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from mla_compile.config import REPORT
from mla_compile.errors import LoadError
from mla_compile.report import text_kind
from mla_compile.reporting.charts import Axis, Bar, Series, bar_chart, dot_rows, line_chart
from mla_compile.reporting.reproduction import reproducing

__all__ = [
    "PAGE",
    "damage_explained",
    "read_measurement",
    "read_report",
    "render_page",
    "write_report",
]

_POINT = {"cache_kept", "method", "model"}
"""What else is read of every model of a measurement."""
_OF_DECODERS = ("cache", "cross_cache", "quality", "polish", "training", "before_training")
"""What reports of other models do not have."""
_UNITS = {
    "fisher": "what errors of keys and values would cost, by the statistics of the calibration text",
    "transmla": "the variance of keys and values, balanced to one length, on the calibration text",
    "mha2mla": "the squares of the weights of keys and values, whatever text they meet",
}
"""What a method's spectrum is a share of, by the method."""
_FEW = 10
PAGE = "report.html"
"""What a report is called for people."""


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write a report into a folder, for programs (``report.json``) and for people (``report.html``)."""
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render_page(report), encoding="utf-8")


def read_report(path: Path) -> Mapping[str, Any]:
    """Read a ``report.json``, or the one in a folder.

    Raises:
        LoadError: There is none, or it is something else.
    """
    stored = path / REPORT if path.is_dir() else path
    if not stored.is_file():
        raise LoadError(f"There is no report '{stored}'.", "Name the report.json that a conversion wrote.")
    try:
        found = json.loads(stored.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(
            f"'{stored}' could not be read as a report ({error}).", "Name the report.json that a conversion wrote."
        ) from error
    if not isinstance(found, dict) or found.get("schema_version") != 1 or "layers" not in found:
        raise LoadError(f"'{stored}' is not a report of a conversion.", "Name the report.json that a conversion wrote.")
    return found


@contextlib.contextmanager
def damage_explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the body, which reads a stored report as if it were whole, into a sentence.

    Args:
        path: Where the report is.

    Raises:
        LoadError: Something is missing in it, or of another form.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
        raise LoadError(
            f"The report of '{path}' is damaged ({type(error).__name__}: {error}).", "Convert the model again."
        ) from error


def read_measurement(path: Path) -> Mapping[str, Any]:
    """Read what ``mla-compile eval --json`` printed.

    Raises:
        LoadError: It is something else, or has no original to compare with.
    """
    remedy = "Write it with: mla-compile eval ... --original MODEL --json > FILE."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"'{path}' could not be read as a measurement ({error}).", remedy) from error
    models = found.get("models") if isinstance(found, dict) else None
    if (
        not isinstance(models, list)
        or not models
        or not all(isinstance(m, dict) and m.get("perplexity_ratio") and m.keys() >= _POINT for m in models)
        or not isinstance(found.get("tokens"), int)
    ):
        raise LoadError(f"'{path}' is not a measurement of models beside their original.", remedy)
    return dict(found)


def render_page(report: Mapping[str, Any], measurement: Mapping[str, Any] | None = None) -> str:
    """Draw a report.

    Args:
        report: What :meth:`~mla_compile.report.Report.to_dict` made, or the same of an encoder or encoder-decoder.
        measurement: What :meth:`~mla_compile.evaluation.measure.Measurement.to_dict` made, to draw quality over cache
            with.

    Returns:
        An HTML document that refers to nothing outside of it.
    """
    pages = Environment(
        loader=PackageLoader("mla_compile.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "count": _count,
        "amount": _amount,
        "bytes": _bytes,
        "percent": _percent,
        "error": _error,
        "text_kind": text_kind,
    }
    return pages.get_template("report.html").render(
        report=dict.fromkeys(_OF_DECODERS) | dict(report),
        name=Path(report["source"]).name,
        kind=report.get("kind", "decoder"),
        shapes=_shapes(report["layers"]),
        predicted=any(layer.get("predicted_loss") is not None for layer in report["layers"]),
        measured=any(layer.get("measured") for layer in report["layers"]),
        cache_chart=_cache_chart(report["layers"]),
        frequency_chart=_frequency_chart(report["layers"]),
        spectrum_chart=_spectrum_chart(report["layers"]),
        spectrum_unit=_UNITS.get(report["config"].get("method", ""), "what all of it carries"),
        loss_chart=_loss_chart(report["layers"]),
        training_chart=_training_chart(report.get("training")),
        quality_chart=_quality_chart(measurement),
        rooflines=_rooflines(report.get("decode_steps") or []),
        commands=reproducing(report),
        in_python=report.get("in_memory", False),
    )


def _shapes(layers: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Distinct shapes of layers before and after, with how many layers have each, the most frequent first."""
    keys = ("heads", "kv_heads", "qk_dim", "v_dim", "rope_groups", "rope_dims", "kv_rank", "rotary_dim")
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for layer in layers:
        found.setdefault(tuple(layer[k] for k in keys), []).append(layer)
    shapes = [
        {
            **{k: same[0][k] for k in keys},
            "layers": len(same),
            "first": same[0]["path"],
            "before": same[0]["elements_before"],
            "after": _row(same[0]),
            "rope": same[0]["rope_groups"] * same[0]["rope_dims"],
        }
        for same in found.values()
    ]
    return sorted(shapes, key=lambda s: -s["layers"])


def _row(layer: Mapping[str, Any]) -> int:
    """Numbers in a layer's row; an encoder's report does not say, for nothing is cached."""
    rope = layer["rope_groups"] * layer["rope_dims"]
    return int(layer.get("elements_after", layer["kv_rank"] + rope))


def _cache_chart(layers: Sequence[Mapping[str, Any]]) -> Markup:
    bars = []
    for layer in layers:
        rope, row = layer["rope_groups"] * layer["rope_dims"], _row(layer)
        scales = row - rope - layer["kv_rank"]
        pieces = [(layer["kv_rank"], "after"), (rope, "other"), (scales, "third")]
        pieces.append((max(layer["elements_before"] - row, 0), "before"))
        bars.append(Bar(layer["path"], [p for p in pieces if p[0]], f"{row} / {layer['elements_before']}"))
    colours = {"latent": "after", "rope keys": "other", "saved": "before", "scales of norms": "third"}
    seen = {kind for bar in bars for _, kind in bar.pieces}
    legend = {told: kind for told, kind in colours.items() if kind in seen}
    return bar_chart("Numbers per token, layer by layer", Axis("numbers per token"), bars, legend)


def _frequency_chart(layers: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Which rotary components go on rotating, over their frequencies."""
    rows = []
    for layer in layers:
        before, kept = layer.get("rope_frequencies_before", []), layer.get("rope_frequencies", [])
        own = layer.get("rope_own") or [True] * len(kept)
        dots = [(f, "before") for f in before] + [
            (f, "after" if alone else "other") for f, alone in zip(kept, own, strict=True)
        ]
        if any(f > 0 for f, _ in dots):
            rows.append((layer["path"], [d for d in dots if d[0] > 0]))
    if not rows:
        return None
    legend = {"of the original": "before", "kept": "after", "kept, with others attached": "other"}
    axis = Axis("radians per position", log=True)
    return dot_rows("Rotary components, by frequency", axis, rows, legend)


def _spectrum_chart(layers: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What latents of every rank leave out, and the ranks that were chosen."""
    known = [layer for layer in layers if layer.get("spectrum")]
    if not known:
        return None
    lines = [Series("a layer", [tuple(p) for p in x["spectrum"]], "after", faint=len(known) > 3) for x in known]
    chosen = [(x["kv_rank"], _interpolated(x["spectrum"], x["kv_rank"])) for x in known]
    dots = Series("its rank", chosen, "other", line=False, dots=True)
    left_out = Axis("share left out", log=True, least=1e-6, most=1.0, written=_power)
    return line_chart("What a latent leaves out, over its rank", Axis("rank"), left_out, [*lines, dots])


def _interpolated(points: Sequence[Sequence[float]], rank: int) -> float:
    below, above = points[0], points[-1]
    for point in points:
        if point[0] <= rank:
            below = point
        if point[0] >= rank:
            above = point
            break
    if above[0] == below[0]:
        return float(below[1])
    share = (rank - below[0]) / (above[0] - below[0])
    return float(below[1] + share * (above[1] - below[1]))


def _loss_chart(layers: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Loss of every layer by itself: what was predicted, and what was measured."""
    rows = []
    for layer in layers:
        measured = (layer.get("measured") or {}).get("loss")
        dots = [(v, kind) for v, kind in ((layer.get("predicted_loss"), "other"), (measured, "after")) if v and v > 0]
        if dots:
            rows.append((layer["path"], dots))
    if not rows:
        return None
    seen = {kind for _, dots in rows for _, kind in dots}
    legend = {told: kind for told, kind in (("predicted", "other"), ("measured", "after")) if kind in seen}
    axis = Axis("nats per token", log=True, written=_power)
    return dot_rows("Loss of each layer by itself", axis, rows, legend)


def _training_chart(training: Mapping[str, Any] | None) -> Markup | None:
    if not training or not training["curve"]:
        return None
    curve = training["curve"]
    lines = [Series("held out", [(p["tokens"], p["held_out"]) for p in curve], "after", dots=True)]
    trained = [(p["tokens"], p["loss"]) for p in curve if p["loss"] is not None]
    if training["objective"] == "next-token":  # other objectives are counted in units of their own
        lines.append(Series("training", trained, "other"))
    return line_chart(
        "Loss of the next token while training", Axis("tokens", written=_count), Axis("nats per token"), lines
    )


def _quality_chart(measurement: Mapping[str, Any] | None) -> Markup | None:
    """Perplexity over the original's, over the share of the cache that is kept; a line per method."""
    if measurement is None:
        return None
    found: dict[str, list[tuple[float, float]]] = {}
    for model in measurement["models"]:
        if model["cache_kept"] is not None:
            found.setdefault(model["method"] or model["model"], []).append(
                (model["cache_kept"], model["perplexity_ratio"])
            )
    kinds = ("after", "other", "third", "before")
    lines = [
        Series(name, sorted(points), kinds[place % len(kinds)], dots=True)
        for place, (name, points) in enumerate(found.items())
    ]
    kept = Axis("share of the cache", least=0.0, written="{:.0%}".format)
    ratio = Axis("perplexity, over the original's", log=True, written="{:g}".format)
    return line_chart(f"Quality on {measurement['tokens']} tokens", kept, ratio, lines) if lines else None


def _rooflines(steps: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, Markup, Sequence[Mapping[str, Any]]]]:
    """For every machine its name, where steps lie under its roof, and the steps."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for step in steps:
        found.setdefault(step["machine"]["name"], []).append(step)
    return [(name, _roofline(name, same), same) for name, same in found.items()]


def _roofline(name: str, steps: Sequence[Mapping[str, Any]]) -> Markup:
    machine = steps[0]["machine"]
    points = {
        side: [
            (
                s[side]["attention_operations"] / s[side]["cache_bytes"],
                s[side]["attention_operations"] * machine["bandwidth"] / s[side]["cache_bytes"],
            )
            for s in steps[-1:]  # both grow with the context
        ]
        for side in ("before", "after")
    }
    rates = {"before": machine["plain"], "after": machine["folded"]}
    dots = [
        Series(f"{side} conversion", [(x, min(y, rates[side])) for x, y in points[side]], side, line=False, dots=True)
        for side in ("before", "after")
    ]
    ends = [x for side in points.values() for x, _ in side]
    bend = machine["folded"] / machine["bandwidth"]
    low, high = min(ends) / 4, max(*ends, bend) * 4
    roof = [(low, low * machine["bandwidth"]), (bend, machine["folded"]), (high, machine["folded"])]
    return line_chart(
        f"Attention to the cache under the roof of {name}",
        Axis("operations per byte of the cache", log=True, written=_power),
        Axis("operations per second", log=True, written=_power),
        [Series("roof", roof, "third"), *dots],
    )


def _count(number: float) -> str:
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _amount(number: float) -> str:
    """A count, or of a few the first figures."""
    return _count(number) if number >= _FEW else f"{number:.2g}"


def _bytes(number: float) -> str:
    if number < 1024:
        return f"{number:.0f} B"
    for unit in ("KiB", "MiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {unit}"
    return f"{number / 1024:.1f} GiB"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.1 else f"{share:.2%}"


def _error(number: float | None) -> str:
    return "" if number is None else f"{number:.1e}"


def _power(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e") if number else "0"
