"""Draw `quality.json` for the documentation: perplexity over the original's, over the share of the cache that is kept.

    python benchmarks/quality_plot.py     # writes docs/quality.svg

One file for light and dark pages: lines have middle tones, text and axes a grey that is read on both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

HERE = Path(__file__).parent
GREY = "#808890"
STYLES = {
    "fisher": ("#2f8fe0", "o", "solid"),
    "fisher+polish": ("#2f8fe0", "s", "dashed"),
    "transmla": ("#e07b2f", "^", "solid"),
    "mha2mla": ("#b05fd0", "D", "solid"),
}
TITLES = {
    "mha4m": "4M parameters, 8 heads of 32",
    "gqa4m": "4M, 8 query and 2 kv heads of 64",
    "stories260k": "0.26M, 8 query and 4 kv heads of 8",
}


def points(rows: list[dict[str, Any]], model: str, method: str) -> list[tuple[float, float]]:
    """Share of the cache and perplexity ratio of one method, from the smallest cache."""
    return sorted(
        (row["cache_kept"], row["perplexity"] / row["base_perplexity"])
        for row in rows
        if (row["model"], row["method"]) == (model, method)
    )


def figure(rows: list[dict[str, Any]]) -> Figure:
    """A panel per model, a line per method."""
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    with matplotlib.rc_context({**style, "svg.fonttype": "none", "font.size": 9}):
        drawn = Figure(figsize=(9.6, 3.6), layout="constrained")
        drawn.patch.set_alpha(0)
        panels = drawn.subplots(1, len(TITLES))
        for axes, (model, title) in zip(panels, TITLES.items(), strict=True):
            axes.patch.set_alpha(0)
            axes.axhline(1.0, color=GREY, linewidth=1, linestyle="dotted")
            for method, (color, marker, line) in STYLES.items():
                if found := points(rows, model, method):
                    kept, ratio = zip(*found, strict=True)
                    axes.plot(kept, ratio, color=color, marker=marker, markersize=4, linestyle=line, label=method)
            top = max(ratio for method in STYLES for _, ratio in points(rows, model, method))
            ticks = [t for t in (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 30) if t <= top * 1.02]
            axes.set_yscale("log")
            axes.set_yticks(ticks)
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"x{value:g}"))
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_title(title, fontsize=9, color=GREY)
            axes.set_xlabel("cache kept")
            axes.grid(visible=True, color=GREY, alpha=0.25)
        panels[0].set_ylabel("perplexity, times the original's")
        panels[-1].legend(frameon=False, labelcolor=GREY)
    return drawn


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "quality.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "quality.svg")
    options = parser.parse_args()
    rows = json.loads(options.json.read_text(encoding="utf-8"))
    # No date and no random names, so that the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "mla-compile", "svg.fonttype": "none"}):
        figure(rows).savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else {}, dpi=150)


if __name__ == "__main__":
    main()
