"""Which text to calibrate on: text like the one that is read later, other text, or text that the model writes itself.

Run as::

    python benchmarks/calibration_text.py --models DIR... --calibrations FILE... --texts FILE... --json OUT
        [--markdown OUT] [--ratios R...]

Every model is converted by ``fisher`` on as many windows of each calibration text and of its own (``sampled``), and by
``mha2mla`` without any, and measured on every text. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mla_compile.config import make_config
from mla_compile.conversion.sampled_text import sample_windows
from mla_compile.disk.statistics_cache import open_cache
from mla_compile.passes.methods import METHODS
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.program import Program
from mla_compile.progress import Stages
from mla_compile.report import environment
from mla_compile.sources import frontend
from mla_compile.text.calibration import SAMPLED
from mla_compile.text.corpus import load_tokenizer, read_documents, token_windows, tokenize
from mla_compile.text.evaluate import original_scorer, perplexity

_RATIOS = (0.5, 0.3125, 0.25)
_LENGTH, _WINDOWS, _MEASURED = 256, 128, 64
_NONE = "none (mha2mla)"


@dataclass(frozen=True)
class Row:
    """One conversion, measured on one text.

    Attributes:
        model: Folder of the original.
        calibration: What it was converted by.
        cache_ratio: Share of the cache that was asked for.
        text: What it was measured on.
        perplexity: On that text.
        base_perplexity: The original's.
    """

    model: str
    calibration: str
    cache_ratio: float
    text: str
    perplexity: float
    base_perplexity: float

    @property
    def ratio(self) -> float:
        """Perplexity over the original's."""
        return self.perplexity / self.base_perplexity


def measure(
    folder: Path, calibrations: Sequence[Path], texts: Sequence[Path], ratios: Sequence[float]
) -> Iterator[Row]:
    """Convert one model by every text, and measure it on every text."""
    program: Program = frontend.load_program(folder)
    tokenizer = load_tokenizer(str(folder))
    found = recognise(program)

    def windows(path: Path, most: int) -> torch.Tensor:
        return token_windows(tokenize(read_documents(path), tokenizer), _LENGTH)[:most]

    held_out = {path.name: windows(path, _MEASURED) for path in texts}
    base = {name: perplexity(original_scorer(program), text).value for name, text in held_out.items()}
    own, _ = sample_windows(program, _WINDOWS, _LENGTH, make_config().seed, None, Stages())
    sources = {path.name: windows(path, _WINDOWS) for path in calibrations} | {SAMPLED: own, _NONE: None}
    for name, source in sources.items():
        with tempfile.TemporaryDirectory() as kept:
            task = Task(program, found.sites, found.rejections, make_config(), source, cache=open_cache(kept))
            for ratio in ratios:
                how = {"method": "mha2mla", "selection": "uniform"} if source is None else {"method": "fisher"}
                config = make_config(cache_ratio=ratio, **how)
                model = task.rewrite(METHODS[config.method](replace(task, config=config)).weights)
                for text, ids in held_out.items():
                    value = perplexity(lambda batch, model=model: model(batch).logits, ids).value  # type: ignore[misc]
                    yield Row(folder.name, name, ratio, text, value, base[text])


def table(rows: Sequence[Row]) -> list[str]:
    """Perplexity over the original's, a line per model and calibration text."""
    ratios, texts = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("cache_ratio", "text"))
    columns = [(text, ratio) for text in texts for ratio in ratios]
    lines = [
        "| model | calibrated on | " + " | ".join(f"{text}, {ratio:.2%}" for text, ratio in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    found = {(r.model, r.calibration, r.text, r.cache_ratio): r.ratio for r in rows}
    for model, calibration in dict.fromkeys((r.model, r.calibration) for r in rows):
        cells = (f"{found[model, calibration, *column]:.4f}" for column in columns)
        lines.append(f"| {model} | {calibration} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--calibrations", type=Path, nargs="*", default=[])
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(_RATIOS))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for folder in arguments.models:
        for row in measure(folder, arguments.calibrations, arguments.texts, arguments.ratios):
            rows.append(row)
            print(f"{row.model} {row.calibration} {row.cache_ratio:g} {row.text} x{row.ratio:.4f}", flush=True)
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    made = environment()
    lines = [
        "# Which text to calibrate on",
        "",
        f"Perplexity over the original's right after conversion, on the first {_MEASURED} windows of {_LENGTH} tokens "
        f"of each text; `fisher` on {_WINDOWS} windows, of which `{SAMPLED}` are those that the model wrote itself, "
        "and `mha2mla` with its uniform selection where there is no text. Nothing was trained.",
        "",
        ", ".join(f"{name} {made[name]}" for name in ("mla-compile", "torch", "transformers") if name in made)
        + f"; seed {make_config().seed}.",
        "",
        *table(rows),
        "",
    ]
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
