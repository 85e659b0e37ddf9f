"""Perplexity before conversion, after it, and after fine-tuning on more and more tokens, from two beginnings.

Run as::

    python benchmarks/finetune.py --models DIR... --text FILE --calibration FILE --json OUT
        [--ratios R...] [--tokens N...] [--methods M...] [--rate R] [--objective O] [--train T] [--quick]

Both beginnings, ``fisher`` and ``mha2mla`` (its paper's settings: 2-norm selection, an eighth of the head rotating,
joint factors), are calibrated on the same windows and trained on the same tokens of ``--calibration`` by the same
recipe; every number of tokens is a training of its own, because the step size falls to zero at its end. Perplexity is
of ``--text``.
``--quick`` is one size and one short training, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mla_compile import frontend
from mla_compile.config import make_config
from mla_compile.corpus import load_tokenizer, read_documents, token_windows, tokenize
from mla_compile.errors import UsageError
from mla_compile.evaluate import original_scorer, perplexity
from mla_compile.opened import module_scorer
from mla_compile.passes.gauge import balanced
from mla_compile.passes.methods import METHODS
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.progress import Stages
from mla_compile.training.recipe import Recipe, make_recipe
from mla_compile.training.run import finetune_module

_LENGTH = 256
_CLOSE = 1.03
"""Perplexity over the original's that counts as reached."""


@dataclass(frozen=True)
class Row:
    """One training, measured; no tokens are the conversion alone."""

    model: str
    method: str
    cache_ratio: float
    cache_kept: float
    tokens: int
    perplexity: float
    base_perplexity: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Perplexity over the original's."""
        return self.perplexity / self.base_perplexity


def measure(folder: Path, arguments: argparse.Namespace, recipe: Recipe) -> Iterator[Row]:
    """Convert and train one model in every way."""
    program = frontend.load_program(folder)
    tokenizer = load_tokenizer(str(folder))

    def windows(path: Path, most: int | None) -> Tensor:
        cut = token_windows(tokenize(read_documents(path), tokenizer), _LENGTH)
        return cut if most is None else cut[:most]

    found = recognise(program)
    text, trained_on = windows(arguments.text, arguments.windows), windows(arguments.calibration, None)
    calibration = trained_on[: arguments.calibration_windows]
    base = perplexity(original_scorer(program), text).value
    for ratio in arguments.ratios:
        for method in arguments.methods:
            selection = {"selection": "2-norm"} if method == "mha2mla" else {}
            config = make_config(method=method, cache_ratio=ratio, **selection)
            task = Task(program, found.sites, found.rejections, config, calibration)
            try:
                choice = METHODS[method](task)
            except UsageError as error:
                print(f"{folder.name} {method} {ratio}: {error}", flush=True)
                continue
            kept = sum(p.elements_after for p in choice.plans) / sum(p.elements_before for p in choice.plans)
            weights = tuple(map(balanced, choice.weights))
            for tokens in (0, *arguments.tokens):
                begin, model = time.perf_counter(), task.rewrite(weights)
                if tokens:
                    pace = recipe.model_copy(update={"tokens": tokens})
                    finetune_module(model, program, trained_on, None, pace, Stages())
                seconds = time.perf_counter() - begin
                value = perplexity(module_scorer(model), text).value
                yield Row(folder.name, method, ratio, kept, tokens, value, base, seconds)


def reached(rows: Sequence[Row]) -> list[str]:
    """Per model and size: the fewest tokens that came close to the original, or to the other beginning."""
    lines = []
    for model, ratio in dict.fromkeys((r.model, r.cache_ratio) for r in rows):
        curves = {
            method: [r for r in rows if (r.model, r.cache_ratio, r.method) == (model, ratio, method)]
            for method in dict.fromkeys(r.method for r in rows)
        }
        for method, curve in curves.items():
            close = [r.tokens for r in curve if r.ratio <= _CLOSE]
            lines.append(
                f"{model} {ratio:.2%} {method}: within 3 % of the original at {min(close, default='no')} tokens"
            )
        for ours in curves.get("fisher", ()):
            other = [r.tokens for r in curves.get("mha2mla", ()) if r.perplexity <= ours.perplexity]
            needed = min(other, default="more than were tried")
            lines.append(f"{model} {ratio:.2%}: mha2mla needs {needed} tokens for what fisher has at {ours.tokens}")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3125, 0.25, 0.125])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**14, 2**16, 2**18, 2**20])
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=["fisher", "mha2mla"])
    parser.add_argument("--objective", default="kl")
    parser.add_argument("--train", default="attention")
    parser.add_argument("--rate", type=float, default=Recipe().rate)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.ratios, arguments.tokens = [0.3125], [2**14]
        arguments.calibration_windows, arguments.windows = 32, 16
    torch.set_num_threads(1)
    recipe = make_recipe(
        objective=arguments.objective,
        train=arguments.train,
        rate=arguments.rate,
        batch=8,
        seq_len=_LENGTH,
        every=2**20,  # the end
    )
    rows: list[Row] = []
    for folder in arguments.models:
        for row in measure(folder, arguments, recipe):
            rows.append(row)
            done = f"{row.model} {row.method} {row.cache_kept:.4f} {row.tokens} x{row.ratio:.4f} {row.seconds:.0f} s"
            print(done, flush=True)
            content = {"recipe": recipe.model_dump(), "text": arguments.text.name, "rows": [asdict(r) for r in rows]}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(reached(rows)))


if __name__ == "__main__":
    main()
