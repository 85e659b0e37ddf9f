"""What latents of few bits cost: perplexity of converted models whose cached latents are rounded to codes.

Run as::

    python benchmarks/cache_codes.py --models DIR... --text FILE --calibration FILE --json OUT --markdown OUT
        [--cache-ratio R] [--windows N] [--add]

Every model is converted once, and then measured with its latents as they are and as each kind of codes that the kernels
read (``mla_compile.runtime.kernels``): encoded and decoded before they are attended to, token by token. Rope keys stay
as they are. Beside them, int4 with a scale for each group of channels instead of one per token, which the kernels do
not have: to see what it would gain.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mla_compile.config import make_config
from mla_compile.disk.statistics_cache import open_cache
from mla_compile.passes.gauge import balanced
from mla_compile.passes.methods import METHODS
from mla_compile.passes.quantise_cache import with_rows
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.report import environment
from mla_compile.runtime.kernels.codes import Codes, decode, encode
from mla_compile.runtime.module import LatentModel
from mla_compile.sources.frontend import load_program
from mla_compile.text.calibration import cut_windows, read_text
from mla_compile.text.corpus import load_tokenizer, read_documents, token_windows, tokenize
from mla_compile.text.evaluate import compare

_LENGTH = 256
_GROUPS = (64, 32, 16)


def rounded(latent: Tensor, codes: Codes, group: int) -> Tensor:
    """What the codes of latents ``[..., r]`` stand for, with a scale per token and so many channels."""
    parts = latent.split(group, -1)
    return torch.cat([decode(*encode(part, codes), part.shape[-1], part.dtype) for part in parts], -1)


def with_rounded_latents(model: LatentModel, round_latent: Callable[[Tensor], Tensor]) -> LatentModel:
    """The model with every new row's latent rounded."""

    def row_of(row: Tensor, cos: Tensor, sin: Tensor, rank: int) -> Tensor:
        latent, rest = row.split([rank, row.shape[-1] - rank], -1)
        return torch.cat([round_latent(latent), rest], -1)

    graph = with_rows(model.graph, row_of)  # type: ignore[arg-type]
    return LatentModel(graph, model.rows)


@dataclass(frozen=True)
class Row:
    """One model with one kind of codes.

    Attributes:
        model: Folder's name.
        latents: What they are stored as.
        bytes_per_token: Of all layers: rope keys of 2 bytes, scales of 4, numbers of 2 where there are no codes.
        perplexity: On the text.
        kl: KL of the predictions from those with exact latents, in nats per token.
        top1: Share of tokens at which both think the same token the most likely.
    """

    model: str
    latents: str
    bytes_per_token: float
    perplexity: float
    kl: float
    top1: float


def measure(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Convert one model and run it in every way beside itself."""
    program, config = load_program(folder), make_config(method="fisher", cache_ratio=arguments.cache_ratio)
    found, text = recognise(program), cut_windows(program, read_text(arguments.calibration), None, config)
    assert text is not None
    task = Task(program, found.sites, found.rejections, config, text.calibration, cache=open_cache(True))
    choice = METHODS[config.method](task)
    plans, model = choice.plans, task.rewrite(tuple(map(balanced, choice.weights)))
    widest = max(plan.kv_rank for plan in plans)
    kinds = {codes.value: (codes, widest) for codes in Codes}
    kinds |= {f"int4, a scale per {group} channels": (Codes.INT4, group) for group in _GROUPS if group < widest}
    models = [model]
    models += [with_rounded_latents(model, partial(rounded, codes=c, group=g)) for c, g in kinds.values()]
    windows = token_windows(tokenize(read_documents(arguments.text), load_tokenizer(str(folder))), _LENGTH)
    scores = [lambda ids, model=model: model(ids).logits for model in models]
    results = compare(scores, windows[: arguments.windows])
    rows = []
    for name, result in zip(("16 bits", *kinds), results, strict=True):
        bytes_per_token = sum(model.rows) * 2.0
        if name != "16 bits":
            codes, group = kinds[name]
            bytes_per_token = sum(
                codes.stored(plan.kv_rank) + 4 * -(-plan.kv_rank // group) + 2 * (row - plan.kv_rank)
                for plan, row in zip(plans, model.rows, strict=True)
            )
        rows.append(Row(folder.name, name, bytes_per_token, result.perplexity.value, result.kl, result.top1))
    return rows


def markdown(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """The table."""
    made = environment()
    lines = [
        "# What latents of few bits cost",
        "",
        f"Converted with `--cache-ratio {arguments.cache_ratio}`, calibrated on {arguments.calibration.name}; "
        f"perplexity over that with exact latents on {arguments.windows} windows of {_LENGTH} tokens of "
        f"{arguments.text.name}, latents rounded in the PyTorch module, rope keys as they are. "
        "Written by `benchmarks/cache_codes.py`.",
        "",
        ", ".join(f"{name} {made[name]}" for name in ("mla-compile", "torch", "transformers") if name in made) + ".",
        "",
        "| model | latents | bytes per token | perplexity | KL, nats per token | same first token |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact = next(r for r in rows if r.model == row.model)
        ratio = f"{row.perplexity:.4f}" if row is exact else f"x{row.perplexity / exact.perplexity:.4f}"
        lines.append(
            f"| {row.model} | {row.latents} | {row.bytes_per_token:.0f} | {ratio} | {row.kl:.5f} | {row.top1:.2%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Perplexity with latents of few bits.")
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--cache-ratio", type=float, default=0.3125)
    parser.add_argument("--windows", type=int, default=64, help="measure on so many windows")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--add", action="store_true", help="to the rows of other models in --json")
    parser.add_argument("--markdown", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    if arguments.add:
        names = {folder.name for folder in arguments.models}
        stored = [Row(**row) for row in json.loads(arguments.json.read_text(encoding="utf-8"))]
        rows = [row for row in stored if row.model not in names]
    for folder in arguments.models:
        found = measure(folder, arguments)
        rows += found
        print("\n".join(f"{row.model} {row.latents} {row.perplexity:.4f}" for row in found), flush=True)
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        arguments.markdown.write_text(markdown(rows, arguments), encoding="utf-8")


if __name__ == "__main__":
    main()
