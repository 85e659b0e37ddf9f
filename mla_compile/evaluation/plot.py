"""Draw measurements: what quality costs, over what is left of the cache; how fast files are, over the context."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mla_compile.artifacts.places import check_place
from mla_compile.disk.writing import moved_into
from mla_compile.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mla_compile.evaluation.benchmark import Benchmark
    from mla_compile.evaluation.measure import Measurement

__all__ = ["check_plot", "curves", "draw", "figure", "speed_figure", "write_figure"]

_SUFFIXES = (".svg", ".png")


def check_plot(path: Path, force: bool) -> None:
    """Refuse a plot that cannot be drawn, before any work is done.

    Raises:
        UsageError: The name does not say what to write or cannot be written, or matplotlib is not installed.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"'{path}' does not say what to draw.", "Name a .svg or .png file.")
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder.", "Name a .svg or .png file.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("matplotlib, which draws plots, is not installed.", "Run: pip install 'mla-compile[plot]'.")
    check_place(path, force)


def curves(result: Measurement) -> Mapping[str, Sequence[tuple[float, float]]]:
    """Points of share of the cache and perplexity ratio, from the smallest cache, by what they are called.

    There is one curve per method, or per method and runtime where models ran in several; a model that does not say how
    it was converted is a curve of its own.
    """
    several = len({measured.model.runtime for measured in result.models}) > 1
    found: dict[str, list[tuple[float, float]]] = {}
    for measured in result.models:
        kept, ratio = measured.kept(result.original), measured.ratio(result.original)
        if kept is not None and ratio is not None:
            model = measured.model
            name = (model.method or model.name) + (f", {model.runtime}" if several else "")
            found.setdefault(name, []).append((kept, ratio))
    return {name: sorted(points) for name, points in found.items()}


def draw(result: Measurement, path: Path) -> None:
    """Write the plot of models that were measured beside their original."""
    write_figure(lambda: figure(result), path)


def write_figure(make: Callable[[], Figure], path: Path) -> None:
    """Write a plot; the file appears under its name only when it is whole.

    Args:
        make: Draws it.
        path: A ``.svg`` or ``.png`` file; one that exists is replaced.
    """
    import matplotlib

    # No date and no random names, so that the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "mla-compile"}), moved_into(path.parent) as folder:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        make().savefig(folder / path.name, dpi=150, metadata=metadata)


def figure(result: Measurement) -> Figure:
    """Draw a measurement, in memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    drawn = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = drawn.add_subplot()
    axes.axhline(1.0, color="black", linewidth=1, linestyle="dashed", label="original")
    for name, points in curves(result).items():
        axes.plot([kept for kept, _ in points], [ratio for _, ratio in points], marker="o", label=name)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("cache kept")
    axes.set_ylabel("perplexity, times the original's")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    return drawn


def speed_figure(result: Benchmark) -> Figure:
    """Draw how many times as fast as the fastest original every file's steps are, a panel per batch, in memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    batches = sorted({step.batch for step in result.steps})
    drawn = Figure(figsize=(1.2 + 4.4 * len(batches), 4.4), layout="constrained")
    panels = drawn.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        axes.axhline(1.0, color="black", linewidth=1, linestyle="dashed", label="fastest original")
        for file in result.files:
            steps = [s for s in result.steps if s.file == file.name and s.batch == batch]
            middle = [s.speedup.median for s in steps]
            spread = [
                [s.speedup.median - s.speedup.low for s in steps],
                [s.speedup.high - s.speedup.median for s in steps],
            ]
            name = f"original, {file.name}" if file.original else file.name
            style = {"linestyle": "dotted"} if file.original else {}
            axes.errorbar([s.context for s in steps], middle, spread, marker="o", capsize=3, label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({step.context for step in result.steps}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("tokens in the cache")
        axes.set_title(f"batch {batch}")
        axes.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("tokens per second, times the fastest original's")
    panels[-1].legend()
    return drawn
