"""Perplexity after conversion: every method at every cache size, on text it was not calibrated on.

Run as::

    python benchmarks/quality.py --models DIR... --text FILE --calibration FILE --json OUT [--markdown OUT]
        [--ratios R...] [--methods M...] [--calibration-windows N] [--windows N]
        [--polish-steps N [--polish-windows N]] [--add]

Every method is given the same calibration windows, and baselines their best setting: ``mha2mla`` the best of four
selections and up to 14 rope dims, ``transmla`` the best of its rope dims and foldings, both by their divergence from
the original on calibration text. Methods that find no place for a latent are left out at that size. With polish steps
every result of ``fisher`` is trained on the calibration text too, and gets a row of its own. Nothing else is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_compile.config import make_config
from mla_compile.disk.statistics_cache import open_cache
from mla_compile.errors import UsageError
from mla_compile.passes.methods import METHODS
from mla_compile.passes.polish import polish
from mla_compile.passes.recognise import recognise
from mla_compile.passes.search import Divergence
from mla_compile.passes.task import Choice, Task
from mla_compile.program import Program
from mla_compile.report import environment
from mla_compile.sources import frontend
from mla_compile.text.corpus import load_tokenizer, read_documents, token_windows, tokenize
from mla_compile.text.evaluate import original_scorer, perplexity

_RATIOS = (0.625, 0.5, 0.375, 0.3125, 0.25, 0.125)
_LENGTH = 256
_POLISHED = "fisher+polish"


@dataclass(frozen=True)
class Row:
    """One conversion, measured.

    Attributes:
        model: Folder of the original.
        method: How it was converted.
        cache_kept: Numbers in the cache, over the original's.
        text: The text it was measured on.
        perplexity: On that text.
        base_perplexity: The original's.
        plan: Sizes of every layer.
        settings: The best ones by the calibration text; of a polished one, also on how many windows of it.
        seconds: Of trying all settings of the method. Statistics are measured by the first method that needs them, at
            the first size, and read again by all others; of a polished one, of polishing.
    """

    model: str
    method: str
    cache_kept: float
    text: str
    perplexity: float
    base_perplexity: float
    plan: list[dict[str, int]]
    settings: dict[str, Any]
    seconds: float

    @property
    def ratio(self) -> float:
        """Perplexity over the original's."""
        return self.perplexity / self.base_perplexity


def settings_of(method: str, task: Task, ratio: float) -> Iterator[dict[str, Any]]:
    """The settings a method is tried with."""
    if method != "mha2mla":
        yield {"method": method, "cache_ratio": ratio}
        return
    rotary = min(s.rope.rotary_dim for s in task.sites)
    for dims in (*range(2, min(rotary, 16) + 1, 2), *range(24, rotary + 1, 8)):
        for selection in ("2-norm", "uniform", "high", "low"):
            yield {"method": method, "cache_ratio": ratio, "selection": selection, "rope_dims": dims}


def best(method: str, task: Task, ratio: float, divergence: Divergence) -> tuple[dict[str, Any], Choice] | None:
    """A method's best choice by calibration text, or None where none fits."""
    found: list[tuple[float, dict[str, Any], Choice]] = []
    for settings in settings_of(method, task, ratio):
        given = replace(task, config=make_config(**settings))
        try:
            choice = METHODS[method](given)
        except UsageError:
            continue
        found.append((divergence(task.rewrite(choice.weights)), settings, choice))
    if not found:
        return None
    _, settings, choice = min(found, key=lambda f: f[0])
    return settings, choice


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Convert one model in every way."""
    program: Program = frontend.load_program(folder)
    tokenizer = load_tokenizer(str(folder))

    def windows(path: Path, most: int | None) -> Tensor:
        cut = token_windows(tokenize(read_documents(path), tokenizer), _LENGTH)
        return cut if most is None else cut[:most]

    recognised = recognise(program)
    calibration, text = (
        windows(arguments.calibration, arguments.calibration_windows),
        windows(arguments.text, arguments.windows),
    )
    task = Task(program, recognised.sites, recognised.rejections, make_config(), calibration)
    more = calibration if arguments.polish_windows is None else windows(arguments.calibration, arguments.polish_windows)
    divergence = Divergence(program, calibration)
    base = perplexity(original_scorer(program), text).value
    with tempfile.TemporaryDirectory() as folder_of_statistics:
        task = replace(task, cache=open_cache(folder_of_statistics))  # measured once for all sizes
        for ratio in arguments.ratios:
            for method in arguments.methods:
                begin = time.perf_counter()
                chosen = best(method, task, ratio, divergence)
                if chosen is None:
                    continue
                settings, choice = chosen
                results = [(method, settings, choice.weights, time.perf_counter() - begin)]
                if method == "fisher" and arguments.polish_steps:
                    begin = time.perf_counter()
                    trained = polish(replace(task, windows=more), choice.weights, arguments.polish_steps).weights
                    polished = {**settings, "polish_steps": arguments.polish_steps, "polish_windows": len(more)}
                    results.append((_POLISHED, polished, trained, time.perf_counter() - begin))
                kept = sum(p.elements_after for p in choice.plans) / sum(p.elements_before for p in choice.plans)
                plan = [{"rope_dims": p.rope_groups * p.rope_dims, "kv_rank": p.kv_rank} for p in choice.plans]
                for name, made_by, weights, seconds in results:
                    model = task.rewrite(weights)
                    value = perplexity(lambda ids, model=model: model(ids).logits, text).value  # type: ignore[misc]
                    yield Row(folder.name, name, kept, arguments.text.name, value, base, plan, made_by, seconds)


def table(rows: Sequence[Row], ratios: Sequence[float]) -> list[str]:
    """One Markdown row per model and method: perplexity over the original's."""
    lines = ["| model | method | " + " | ".join(f"{r:.2%}" for r in ratios) + " |", "|---" * (2 + len(ratios)) + "|"]
    for model in dict.fromkeys(r.model for r in rows):
        base = next(r.base_perplexity for r in rows if r.model == model)
        for method in dict.fromkeys(r.method for r in rows if r.model == model):
            cells = []
            for ratio in ratios:
                found = [
                    r for r in rows if (r.model, r.method) == (model, method) and r.settings["cache_ratio"] == ratio
                ]
                cells.append(f"{found[0].ratio:.4f}" if found else "-")
            lines.append(f"| {model} ({base:.3f}) | {method} | " + " | ".join(cells) + " |")
    return lines


def excess(rows: Sequence[Row], ratios: Sequence[float]) -> list[str]:
    """What is left of the better baseline's log-perplexity excess."""
    lines = ["| model | " + " | ".join(f"{r:.2%}" for r in ratios) + " |", "|---" * (1 + len(ratios)) + "|"]
    for model in dict.fromkeys(r.model for r in rows):
        cells = []
        for ratio in ratios:
            mine = {r.method: math.log(r.ratio) for r in rows
                    if r.model == model and r.settings["cache_ratio"] == ratio}  # fmt: skip
            others = [value for method, value in mine.items() if method not in ("fisher", _POLISHED)]
            cells.append(f"{mine['fisher'] / min(others):.2f}" if others and "fisher" in mine else "-")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(_RATIOS))
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=["fisher", "transmla", "mha2mla"])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--polish-steps", type=int, default=0, help="also train what fisher chose, for so many steps")
    parser.add_argument("--polish-windows", type=int, help="train on so many windows instead of the calibration's")
    parser.add_argument("--windows", type=int, help="measure on so many windows only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="to the rows of other models and methods in --json")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    if arguments.add:
        stored = [Row(**row) for row in json.loads(arguments.json.read_text(encoding="utf-8"))]
        methods = {*arguments.methods, *([_POLISHED] if "fisher" in arguments.methods else [])}
        anew = {(folder.name, method) for folder in arguments.models for method in methods}
        rows = [row for row in stored if (row.model, row.method) not in anew]
    for folder in arguments.models:
        for row in measure(folder, arguments):
            rows.append(row)
            print(f"{row.model} {row.method} {row.cache_kept:.4f} x{row.ratio:.4f} {row.seconds:.0f} s", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    made = environment()
    polished = {(r.settings["polish_steps"], r.settings["polish_windows"]) for r in rows if r.method == _POLISHED}
    trained = "no training"
    if polished:
        steps = " or ".join(f"{count} steps on {windows} windows" for count, windows in sorted(polished))
        trained += f" but, for `{_POLISHED}`, {steps} of the same text"
    first = "all" if arguments.windows is None else f"the first {arguments.windows}"
    measured = f"{first} windows of {_LENGTH} tokens"
    head = [
        "# Quality right after conversion",
        "",
        f"Perplexity over the original's (which stands behind the model's name) on {measured} of "
        f"{arguments.text.name}; calibrated on {arguments.calibration_windows} windows of "
        f"{arguments.calibration.name}; {trained}. Baselines at their best setting by calibration text.",
        "",
        ", ".join(f"{name} {made[name]}" for name in ("mla-compile", "torch", "transformers") if name in made)
        + f"; seed {make_config().seed}.",
        "",
    ]
    lines = [*head, *table(rows, arguments.ratios), "", "What is left of the better baseline's log-perplexity excess:"]
    lines += ["", *excess(rows, arguments.ratios), ""]
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
