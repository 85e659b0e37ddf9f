"""Perplexity before conversion, after it, and after fine-tuning on more and more tokens, from two beginnings.

Run as::

    python benchmarks/finetune.py --models DIR... --text FILE --calibration FILE --json OUT [--markdown OUT]
        [--ratios R...] [--tokens N...] [--methods M...] [--objective O] [--match-steps N] [--train T] [--rate R]
        [--decay D] [--quick] [--list]

Both beginnings, ``fisher`` and ``mha2mla`` (its paper's settings: 2-norm selection, an eighth of the head rotating,
joint factors), are calibrated on the same windows and trained on the same tokens of ``--calibration`` by the same
recipe; every number of tokens is a training of its own, because the step size falls to zero at its end. Perplexity is
of ``--text``.

A result is a cell of the table, and is added to ``--json`` when it is there, whole or not at all. What is there already
is not measured again: end the process whenever you like, and start it again with the same settings to go on. Cells
come in order of what they are worth for the processor time they take, the first of ``--ratios`` counting twice;
``--list`` says how long each of the missing ones will take, by the speed of those that were measured, and ends
(``--markdown`` is written all the same).
``--quick`` is one size and one short training, to see that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_compile.artifacts.runnable import module_scorer
from mla_compile.config import make_config
from mla_compile.disk.statistics_cache import open_cache
from mla_compile.disk.writing import whole_file
from mla_compile.errors import UsageError
from mla_compile.passes.gauge import balanced
from mla_compile.passes.methods import METHODS
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.program import Program
from mla_compile.progress import Stages
from mla_compile.report import environment
from mla_compile.sources import frontend
from mla_compile.text.corpus import load_tokenizer, read_documents, token_windows, tokenize
from mla_compile.text.evaluate import original_scorer, perplexity
from mla_compile.training.recipe import Recipe, make_recipe
from mla_compile.training.run import finetune_module

_LENGTH = 256
_CLOSE = 1.03
"""Perplexity over the original's that counts as reached."""
_LONGER = 4
"""How many times the tokens the other beginning is expected to need."""
_OURS, _THEIRS = "fisher", "mha2mla"


class Cell(NamedTuple):
    """One training; no tokens are the conversion alone."""

    model: str
    cache_ratio: float
    method: str
    tokens: int


@dataclass(frozen=True)
class Row:
    """A cell, measured.

    Attributes:
        model: The model's folder.
        cache_ratio: The cache that was asked for.
        method: How it was converted.
        tokens: Tokens trained on.
        cache_kept: The cache that was got.
        perplexity: Of the unseen text; None where the method has no place for a latent of this size.
        base_perplexity: The original's.
        cpu_seconds: Processor time of the training, on one core.
    """

    model: str
    cache_ratio: float
    method: str
    tokens: int
    cache_kept: float | None
    perplexity: float | None
    base_perplexity: float
    cpu_seconds: float

    @property
    def cell(self) -> Cell:
        """What was measured."""
        return Cell(self.model, self.cache_ratio, self.method, self.tokens)

    @property
    def ratio(self) -> float:
        """Perplexity over the original's; infinite where there is none."""
        return float("inf") if self.perplexity is None else self.perplexity / self.base_perplexity


@dataclass(frozen=True)
class Results:
    """The file of results.

    Attributes:
        path: Where it is.
        settings: What all rows have in common.
        rows: What was measured.
    """

    path: Path
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Results:
        """Read what is there; results of other settings are not mixed with it."""
        if not path.is_file():
            return cls(path, settings)
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] != settings:
            changed = [name for name in settings if stored["settings"].get(name) != settings[name]]
            raise SystemExit(f"{path} was measured with other settings ({', '.join(changed)}); name another file.")
        return cls(path, settings, [Row(**row) for row in stored["rows"]])

    def add(self, row: Row) -> None:
        """Append one row, so that the file is whole at any time."""
        self.rows.append(row)
        content = {"environment": environment(), "settings": self.settings, "rows": [asdict(r) for r in self.rows]}
        with whole_file(self.path) as file:
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def seconds(self, cell: Cell) -> float:
        """Processor time a cell will take, by the speed of its model so far; 0 where nothing is known."""
        tried = [r for r in self.rows if r.model == cell.model and r.tokens]
        most = max(tried, key=lambda r: r.tokens, default=None)
        return 0.0 if most is None else cell.tokens * most.cpu_seconds / most.tokens


@dataclass(frozen=True)
class Bench:
    """A model and its text, read once."""

    folder: Path
    arguments: argparse.Namespace
    statistics: str

    @cached_property
    def program(self) -> Program:
        """The original."""
        return frontend.load_program(self.folder)

    @cached_property
    def text(self) -> Tensor:
        """Windows to measure on."""
        return self._windows(self.arguments.text)[: self.arguments.windows]

    @cached_property
    def trained_on(self) -> Tensor:
        """Windows to calibrate and to train on."""
        return self._windows(self.arguments.calibration)

    @cached_property
    def base(self) -> float:
        """The original's perplexity."""
        return perplexity(original_scorer(self.program), self.text).value

    @cached_property
    def task(self) -> Task:
        """What methods are given."""
        found = recognise(self.program)
        calibration = self.trained_on[: self.arguments.calibration_windows]
        cache = open_cache(self.statistics)  # measured once for all sizes
        return Task(self.program, found.sites, found.rejections, make_config(), calibration, cache=cache)

    def measure(self, cell: Cell, recipe: Recipe) -> Row:
        """Convert, train and measure."""
        selection = {"selection": "2-norm"} if cell.method == _THEIRS else {}
        config = make_config(method=cell.method, cache_ratio=cell.cache_ratio, **selection)
        task = replace(self.task, config=config)
        try:
            choice = METHODS[cell.method](task)
        except UsageError:
            return Row(*cell, None, None, self.base, 0.0)
        kept = sum(p.elements_after for p in choice.plans) / sum(p.elements_before for p in choice.plans)
        model = task.rewrite(tuple(map(balanced, choice.weights)))
        begin = time.process_time()
        if cell.tokens:
            pace = recipe.model_copy(update={"tokens": cell.tokens})
            finetune_module(model, self.program, self.trained_on, None, pace, Stages())
        seconds = time.process_time() - begin
        value = perplexity(module_scorer(model), self.text).value
        return Row(*cell, kept, value, self.base, round(seconds, 1))

    def _windows(self, path: Path) -> Tensor:
        return token_windows(tokenize(read_documents(path), load_tokenizer(str(self.folder))), _LENGTH)


def missing(cells: Sequence[Cell], results: Results, first: float) -> list[Cell]:
    """Cells that were not measured, the most worth for its time first; ``first`` is the size that counts twice."""
    there = {row.cell for row in results.rows}
    nowhere = {row.cell._replace(tokens=0) for row in results.rows if row.perplexity is None}
    left = [cell for cell in cells if cell not in there and cell._replace(tokens=0) not in nowhere]
    return sorted(left, key=lambda cell: results.seconds(cell) * (1 if cell.cache_ratio == first else 2))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: perplexity over the original's."""
    known = {row.cell: row for row in rows}
    tokens = sorted({row.tokens for row in rows})
    yield (
        "| model | cache asked for | from | " + " | ".join(f"{n:,} tokens" if n else "converted" for n in tokens) + " |"
    )
    yield "|---" * (3 + len(tokens)) + "|"
    for model, ratio, method in dict.fromkeys(cell[:3] for cell in sorted(known, key=lambda c: (c[0], -c[1], c[2]))):
        found = [known.get(Cell(model, ratio, method, n)) for n in tokens]
        if known[Cell(model, ratio, method, 0)].perplexity is None:
            yield f"| {model} | {ratio:.2%} | {method} |" + " none |" * len(tokens)
        else:
            values = " | ".join("" if row is None else f"{row.ratio:.4f}" for row in found)
            yield f"| {model} | {ratio:.2%} | {method} | {values} |"


def goals(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: the fewest tokens that came close to the original, and to what our beginning reached."""
    for model, ratio in dict.fromkeys((r.model, r.cache_ratio) for r in sorted(rows, key=lambda r: r.cell)):
        curves = {
            method: sorted((r for r in rows if r.cell[:3] == (model, ratio, method)), key=lambda r: r.tokens)
            for method in (_OURS, _THEIRS)
        }
        for method, curve in curves.items():
            close = min((r.tokens for r in curve if r.ratio <= _CLOSE), default=None)
            most = max((r.tokens for r in curve if r.perplexity is not None), default=None)
            if most is not None:
                reached = f"by {close:,} tokens" if close is not None else f"not by {most:,} tokens"
                yield f"- {model} at {ratio:.2%} from {method}: within {_CLOSE - 1:.0%} of the original {reached}."
        for mine, theirs in itertools.product(curves[_OURS], curves[_THEIRS]):
            if mine.tokens and theirs.tokens == _LONGER * mine.tokens and theirs.perplexity is not None:
                worse = theirs.ratio > mine.ratio
                yield (
                    f"- {model} at {ratio:.2%}: {_THEIRS} after {theirs.tokens:,} tokens is "
                    f"{'behind' if worse else 'not behind'} {_OURS} after {mine.tokens:,} "
                    f"({theirs.ratio:.4f}, {mine.ratio:.4f})."
                )


def page(results: Results, left: Sequence[Cell], command: str) -> str:
    """All of it as Markdown."""
    settings, recipe = results.settings, results.settings["recipe"]
    bases = {row.model: row.base_perplexity for row in results.rows}
    made = environment()
    lines = [
        "# Fine-tuning after conversion",
        "",
        f"Perplexity over the original's on the first {settings['windows']} windows of {_LENGTH} tokens of "
        f"{settings['text']}, after training on so many tokens of {settings['calibration']}, on whose first "
        f"{settings['calibration_windows']} windows both conversions are calibrated. The originals': "
        + ", ".join(f"{name} {value:.3f}" for name, value in bases.items())
        + ".",
        "",
        f"Both beginnings have the same tokens and recipe: objective `{recipe['objective']}` (the original is the "
        f"teacher), trained `{recipe['train']}`, step size {recipe['rate']}, warm-up {recipe['warm_up']:.0%}, decay "
        f"{recipe['decay']:.0%}, {recipe['match_steps']} steps of matching in front, batches of {recipe['batch']} "
        f"windows of {_LENGTH}. `{_THEIRS}` has its paper's settings. Cells equal to `converted` are no rounding: at "
        "its end the training was no closer to the original on the "
        f"{recipe['eval_windows']} windows held out of its text than before, so that the weights of step 0 were kept.",
        "",
        ", ".join(f"{name} {made[name]}" for name in ("mla-compile", "torch", "transformers") if name in made)
        + f"; seed {recipe['seed']}.",
        "",
        *table(results.rows),
        "",
        *goals(results.rows),
        "",
    ]
    if left:
        hours = sum(map(results.seconds, left)) / 3600
        lines += [
            f"Cells that are empty or have no row ({len(left)} of {len(left) + len(results.rows)}) were not measured; "
            f"those of models that have a row take about {hours:.1f} hours of one core. This goes on:",
            "",
            f"    {command}",
            "",
        ]
    return "\n".join(lines)


def command(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """What was called, wherever files lie."""
    words = ["python", "benchmarks/finetune.py"]
    for name, value in vars(arguments).items():
        if value != parser.get_default(name) and name != "list":
            values = value if isinstance(value, list) else [] if value is True else [value]
            folder = "benchmarks" if name in ("json", "markdown") else "DIR"
            words += ["--" + name.replace("_", "-")]
            words += [f"{folder}/{v.name}" if isinstance(v, Path) else str(v) for v in values]
    return " ".join(words)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3125, 0.5, 0.25, 0.125])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**14, 2**16, 2**18, 2**20])
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=[_OURS, _THEIRS])
    parser.add_argument("--objective", default="kl")
    parser.add_argument("--match-steps", type=int, default=0)
    parser.add_argument("--train", default=Recipe().train)
    parser.add_argument("--rate", type=float, default=Recipe().rate)
    parser.add_argument("--decay", type=float, default=Recipe().decay)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.ratios, arguments.tokens = [0.3125], [2**14]
        arguments.calibration_windows, arguments.windows = 32, 16
    torch.set_num_threads(1)
    recipe = make_recipe(
        objective=arguments.objective,
        match_steps=arguments.match_steps,
        train=arguments.train,
        rate=arguments.rate,
        decay=arguments.decay,
        batch=8,
        seq_len=_LENGTH,
        eval_windows=8,
        every=2**20,  # the end
    )
    settings = {
        "recipe": recipe.model_dump(exclude={"tracker"}),  # changes nothing that is measured
        "text": arguments.text.name,
        "calibration": arguments.calibration.name,
        "calibration_windows": arguments.calibration_windows,
        "windows": arguments.windows,
    }
    results = Results.open(arguments.json, settings)
    models = [folder.name for folder in arguments.models]
    amounts = [0, *arguments.tokens]
    cells = [Cell(*of) for of in itertools.product(models, arguments.ratios, arguments.methods, amounts)]
    with tempfile.TemporaryDirectory() as statistics:
        benches = {folder.name: Bench(folder, arguments, statistics) for folder in arguments.models}
        while left := missing(cells, results, arguments.ratios[0]):
            if arguments.list:
                print("\n".join(f"{results.seconds(cell):7.0f} s {' '.join(map(str, cell))}" for cell in left))
                break
            row = benches[left[0].model].measure(left[0], recipe)
            results.add(row)
            print(f"{' '.join(map(str, row.cell))} x{row.ratio:.4f} {row.cpu_seconds:.0f} s", flush=True)
    if arguments.markdown:
        left = missing(cells, results, arguments.ratios[0])
        arguments.markdown.write_text(page(results, left, command(arguments, parser)), encoding="utf-8")
    print("\n".join(goals(results.rows)))


if __name__ == "__main__":
    main()
