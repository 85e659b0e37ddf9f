"""Charts as SVG markup, for a page that needs no network: colours come from the page's style, sizes from its width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from markupsafe import Markup, escape

__all__ = ["Axis", "Bar", "Series", "bar_chart", "dot_rows", "line_chart"]

_WIDTH = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 18, 40
_ROW = 18
"""Height of a line of a chart that has one per layer."""
_NAME = 15
"""Letters that its name has room for."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a chart.

    Attributes:
        label: What is drawn along it, with its unit.
        log: Whether steps are factors.
        least: Smallest value that is shown, where the data does not say.
        most: Largest one.
        written: How numbers are written.
    """

    label: str
    log: bool = False
    least: float | None = None
    most: float | None = None
    written: Callable[[float], str] = "{:g}".format

    def fitted(self, values: Sequence[float]) -> Axis:
        """The same axis with both ends known; a logarithmic one ignores what is not above 0."""
        seen = [v for v in values if math.isfinite(v) and (v > 0 or not self.log)]
        least = self.least if self.least is not None else min(seen, default=1.0 if self.log else 0.0)
        most = self.most if self.most is not None else max(seen, default=least)
        if self.log:
            least, most = 10 ** math.floor(math.log10(least) + 1e-9), 10 ** math.ceil(math.log10(most) - 1e-9)
            most = most if most > least else 10 * least
        elif most <= least:
            most = least + 1.0
        return Axis(self.label, self.log, least, most, self.written)

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1, between the ends; beyond them it lies on the end."""
        least, most = self._ends
        if self.log:
            share = (math.log(max(value, least)) - math.log(least)) / (math.log(most) - math.log(least))
        else:
            share = (value - least) / (most - least)
        return min(max(share, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """About five round values."""
        least, most = self._ends
        if self.log:
            low, high = round(math.log10(least)), round(math.log10(most))
            if high - low <= 2:
                return [v for p in range(low, high + 1) for d in (1, 2, 5) if (v := d * 10.0**p) <= most * 1.001]
            return [10.0**power for power in range(low, high + 1, math.ceil((high - low) / 5))]
        rough = (most - least) / 4
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = magnitude * next(s for s in (1, 2, 5, 10) if s * magnitude >= rough * 0.999)
        first = math.ceil(least / step - 1e-9)
        return [i * step for i in range(first, math.floor(most / step + 1e-9) + 1)]

    @property
    def _ends(self) -> tuple[float, float]:
        if self.least is None or self.most is None:
            raise ValueError(f"The axis '{self.label}' has no ends yet. Call fitted with data first.")
        return self.least, self.most


@dataclass(frozen=True, slots=True)
class Series:
    """A line, or dots.

    Attributes:
        name: What it is, for the legend; lines of one name are told once.
        points: Pairs of x and y.
        kind: Name of its colour in the page's style: ``before``, ``after`` or ``other``.
        line: Whether points are joined.
        dots: Whether they are marked.
        faint: Whether it is one of many.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "after"
    line: bool = True
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar of some pieces, one behind the other.

    Attributes:
        name: What stands before it.
        pieces: Lengths, and the names of their colours.
        note: What stands behind it.
    """

    name: str
    pieces: Sequence[tuple[float, str]]
    note: str = ""


def line_chart(title: str, x: Axis, y: Axis, series: Sequence[Series], height: int = 250) -> Markup:
    """Lines and dots over two axes.

    Args:
        title: What a reader who does not see it is told.
        x: Axis to the right.
        y: Axis upwards.
        series: What is drawn.
        height: Of the chart, in its own units, of which it is 440 wide.
    """
    x = x.fitted([p[0] for s in series for p in s.points])
    y = y.fitted([p[1] for s in series for p in s.points])
    right, bottom = _WIDTH - _RIGHT, height - _BOTTOM

    def across(value: float) -> float:
        return _LEFT + x.place(value) * (right - _LEFT)

    def up(value: float) -> float:
        return bottom - y.place(value) * (bottom - _TOP)

    drawn = []
    for tick in y.ticks():
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        drawn.append(_text(_LEFT - 6, up(tick) + 4, y.written(tick), "end"))
    drawn += [_text(across(tick), bottom + 15, x.written(tick), "middle") for tick in x.ticks()]
    drawn.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    drawn.append(_text((_LEFT + right) / 2, height - 6, x.label, "middle", "label"))
    drawn.append(_text(_LEFT, _TOP - 7, y.label, "start", "label"))
    for one in series:
        style = f"{one.kind} faint" if one.faint else one.kind
        places = [(across(a), up(b)) for a, b in one.points if math.isfinite(a) and math.isfinite(b)]
        if one.line and len(places) > 1:
            joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            drawn.append(f'<polyline class="line {style}" points="{joined}"/>')
        if one.dots or len(places) == 1:
            for (a, b), point in zip(places, one.points, strict=False):
                told = f"{one.name}: {x.written(point[0])}, {y.written(point[1])}"
                drawn.append(f'<circle class="dot {style}" cx="{a:.1f}" cy="{b:.1f}" r="3.2">{_tooltip(told)}</circle>')
    return _picture(title, height, drawn, {s.name: s.kind for s in series})


def bar_chart(title: str, x: Axis, bars: Sequence[Bar], legend: dict[str, str]) -> Markup:
    """Horizontal bars, one per line.

    Args:
        title: What a reader who does not see it is told.
        x: Axis of their lengths.
        bars: From above.
        legend: What the colours stand for, by what is told.
    """
    x = Axis(x.label, x.log, 0.0, x.most, x.written).fitted([sum(n for n, _ in bar.pieces) for bar in bars])
    left, right = 96, _WIDTH - 64
    drawn = []
    names = _told_apart([bar.name for bar in bars])
    for line, (bar, short) in enumerate(zip(bars, names, strict=True)):
        top = _TOP + line * _ROW
        drawn.append(_text(left - 6, top + 12, short, "end"))
        start = 0.0
        for length, kind in bar.pieces:
            a, b = (left + x.place(v) * (right - left) for v in (start, start + length))
            drawn.append(
                f'<rect class="piece {kind}" x="{a:.1f}" y="{top + 2}" width="{max(b - a, 0):.1f}" height="{_ROW - 5}">'
                f"{_tooltip(f'{bar.name}: {x.written(length)}')}</rect>"
            )
            start += length
        drawn.append(_text(left + x.place(start) * (right - left) + 5, top + 12, bar.note, "start"))
    height = _TOP + _ROW * len(bars) + 24
    drawn.append(_text((left + right) / 2, height - 6, x.label, "middle", "label"))
    return _picture(title, height, drawn, legend)


def dot_rows(
    title: str, x: Axis, rows: Sequence[tuple[str, Sequence[tuple[float, str]]]], legend: dict[str, str]
) -> Markup:
    """Dots along one axis, a line of them per row.

    Args:
        title: What a reader who does not see it is told.
        x: The axis.
        rows: Names, and the places and colours of what is on the row.
        legend: What the colours stand for, by what is told.
    """
    x = x.fitted([place for _, dots in rows for place, _ in dots])
    left, right = 96, _WIDTH - _RIGHT
    bottom = _TOP + _ROW * len(rows)
    drawn = []
    for tick in x.ticks():
        a = left + x.place(tick) * (right - left)
        drawn.append(f'<line class="grid" x1="{a:.1f}" x2="{a:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        drawn.append(_text(a, bottom + 14, x.written(tick), "middle"))
    names = _told_apart([name for name, _ in rows])
    for line, ((name, dots), short) in enumerate(zip(rows, names, strict=True)):
        middle = _TOP + line * _ROW + _ROW / 2
        drawn.append(_text(left - 6, middle + 4, short, "end"))
        for place, kind in dots:
            a = left + x.place(place) * (right - left)
            told = f"{name}: {x.written(place)}"
            drawn.append(f'<circle class="dot {kind}" cx="{a:.1f}" cy="{middle:.1f}" r="3">{_tooltip(told)}</circle>')
    height = bottom + 38
    drawn.append(_text((left + right) / 2, height - 6, x.label, "middle", "label"))
    return _picture(title, height, drawn, legend)


def _picture(title: str, height: int, drawn: Sequence[str], legend: dict[str, str]) -> Markup:
    keys = "".join(
        f'<span class="key"><i class="{kind}"></i>{escape(name)}</span>' for name, kind in legend.items() if name
    )
    picture = (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
        f"<figcaption><b>{escape(title)}</b>{keys}</figcaption>"
    )
    return Markup(f"<figure>{picture}</figure>")


def _text(x: float, y: float, content: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _tooltip(told: str) -> str:
    return f"<title>{escape(told)}</title>"


def _told_apart(names: Sequence[str]) -> list[str]:
    """Module paths as short as still tells them apart: what all of them have alike is left out."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2 or len({*names}) < len(names):
        return [_shortened(name) for name in names]
    if len({*map(len, parts)}) == 1:
        kept = [place for place, same in enumerate(zip(*parts, strict=True)) if len({*same}) > 1]
        if kept[0] and all(words[kept[0]].isdigit() for words in parts):
            named = [".".join([words[kept[0] - 1], *(words[k] for k in kept)]) for words in parts]
            if max(map(len, named)) <= _NAME:
                return named  # layers.7 rather than 7
        short = [".".join(words[k] for k in kept) for words in parts]
    else:
        alike = list(takewhile(lambda same: len({*same}) == 1, zip(*parts, strict=False)))
        short = [".".join(words[min(len(alike), len(words) - 1) :]) for words in parts]
    begun = [name if len(name) <= _NAME else f"{name[: _NAME - 1]}…" for name in short]
    return begun if len({*begun}) == len(begun) else [_shortened(name) for name in short]


def _shortened(name: str) -> str:
    """The end of a module path."""
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
