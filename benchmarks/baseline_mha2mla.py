"""Perplexity of the MHA2MLA method, training-free, on trained models: every selection, SVD and cache size.

Usage: python benchmarks/baseline_mha2mla.py --model FOLDER [--model FOLDER ...] --calibration TEXT [TEXT ...]
       --text TEXT [TEXT ...] [--out benchmarks/baseline_mha2mla.md]

Every text is scored in the same windows for all rows; ``ORT`` columns score the ONNX file of the same conversion.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from mla_compile.config import CompileConfig, make_config
from mla_compile.corpus import load_tokenizer, read_documents, token_windows, tokenize
from mla_compile.errors import UsageError
from mla_compile.evaluate import original_scorer, perplexity
from mla_compile.frontend import load_program
from mla_compile.passes.calibrate import PairNorms, pair_norms
from mla_compile.passes.factorise import factorise_mha2mla
from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.lower_onnx import lower_to_onnx
from mla_compile.passes.recognise import recognise
from mla_compile.passes.weights import SiteWeights, input_width, read_site
from mla_compile.plan import LatentPlan, plan_layers
from mla_compile.program import Program
from mla_compile.report import environment
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.site import AttentionSite

SELECTIONS = ("2-norm", "uniform", "high", "low")
SVDS = ("joint", "split")
RATIOS = (0.625, 0.5, 0.3125, 0.25, 0.125)


class Bench:
    """One model with everything that does not change between conversions computed once."""

    def __init__(
        self, folder: str, calibration: Sequence[str], texts: Sequence[str], windows: int, length: int
    ) -> None:
        self.program: Program = load_program(folder)
        self.sites: tuple[AttentionSite, ...] = recognise(self.program).sites
        self.weights: list[SiteWeights] = [read_site(self.program, s) for s in self.sites]
        self.widths = [input_width(self.program, s) for s in self.sites]
        tokenizer = load_tokenizer(folder)

        def cut(path: str, tokens: int) -> Tensor:
            return token_windows(tokenize(read_documents(path), tokenizer), length, tokens)

        self.texts = [cut(path, windows * length) for path in texts]
        calibrated = torch.cat([cut(path, 65536 // len(calibration)) for path in calibration])
        self.calibration_tokens = calibrated.numel()
        self.norms: tuple[PairNorms, ...] = pair_norms(self.program, self.sites, calibrated)
        original = original_scorer(self.program)
        self.base = [perplexity(original, text).value for text in self.texts]
        self.base_onnx = self._original_in_onnx_runtime()

    def _original_in_onnx_runtime(self) -> list[float]:
        """Perplexity of every text with the unconverted graph in ONNX Runtime."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "original.onnx"
            names = [str(name) for name in self.program.exported.graph_signature.user_inputs]
            exported = torch.onnx.export(
                self.program.exported, (), input_names=names, opset_version=23, dynamo=True, verbose=False
            )
            exported.save(path)  # type: ignore[union-attr]
            session = onnxruntime.InferenceSession(str(path))

            def score(ids: Tensor) -> Tensor:
                inputs = zip(names, self.program.inputs(ids), strict=True)
                return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs})[0])

            return [perplexity(score, text).value for text in self.texts]

    def plans(self, config: CompileConfig) -> tuple[LatentPlan, ...] | None:
        """The plan, or None where the ratio leaves no room."""
        try:
            return plan_layers(self.sites, self.widths, config)
        except UsageError:
            return None

    def convert(self, config: CompileConfig, plans: Sequence[LatentPlan]) -> LatentModel:
        """Factorise and rewrite."""
        latent = [
            factorise_mha2mla(site, weights, plan, config, norms)
            for site, weights, plan, norms in zip(self.sites, self.weights, plans, self.norms, strict=True)
        ]
        graph = insert_latent(self.program, self.sites, latent, torch.float32)
        return LatentModel(graph.module, graph.rows)

    def torch_perplexities(self, model: LatentModel) -> list[float]:
        """Perplexity of every text in PyTorch."""
        return [perplexity(lambda ids: model(ids).logits, text).value for text in self.texts]

    def onnx_perplexities(self, model: LatentModel) -> list[float]:
        """Perplexity of every text in ONNX Runtime."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            lower_to_onnx(model.graph, model.rows, path, opset=23, inline=False, metadata={})  # type: ignore[arg-type]
            decoder = OnnxDecoder(path, threads=torch.get_num_threads())
            return [perplexity(lambda ids: torch.from_numpy(decoder.logits(ids.numpy())), t).value for t in self.texts]


def rope_choices(site: AttentionSite) -> list[int]:
    """Rope dims per head to try, up to the head."""
    return [d for d in (2, 4, 6, 8, 12, 16, 24, 32, 48, 64) if d <= site.rope.rotary_dim]


def cells(values: Sequence[float]) -> str:
    """Perplexities of all texts in one table cell."""
    return " / ".join(f"{v:.4f}" if v < 100 else f"{v:.2f}" for v in values)


def report(bench: Bench, name: str, ratios: Sequence[float], onnx_ratios: Sequence[float]) -> list[str]:
    """All tables of one model as Markdown lines."""
    site = bench.sites[0]
    lines = [
        f"## {name}",
        "",
        f"{len(bench.sites)} layers, {site.heads} query / {site.kv_heads} kv heads of {site.qk_dim}; "
        f"{site.elements_per_token} cached numbers per token and layer; calibration {bench.calibration_tokens} tokens; "
        f"scored {' / '.join(str(t.numel() - len(t)) for t in bench.texts)} tokens; "
        f"original perplexity **{cells(bench.base)}** (in ONNX Runtime {cells(bench.base_onnx)}).",
        "",
        f"The paper's rope share ({plan_default(site)} channels per head):",
        "",
        "| cache kept | selection | joint SVD | joint SVD, ORT | split SVD | split SVD, ORT |",
        "|---|---|---|---|---|---|",
    ]
    worst = max(abs(a / b - 1) for a, b in zip(bench.base_onnx, bench.base, strict=True))
    for ratio in ratios:
        for selection in SELECTIONS:
            row = [f"{ratio:.2%}", selection]
            for svd in SVDS:
                config = make_config(cache_ratio=ratio, selection=selection, svd=svd)
                plans = bench.plans(config)
                if plans is None:
                    row += ["no room", "-"]
                    continue
                model = bench.convert(config, plans)
                ours = bench.torch_perplexities(model)
                theirs = bench.onnx_perplexities(model) if ratio in onnx_ratios else []
                worst = max([worst, *(abs(a / b - 1) for a, b in zip(theirs, ours, strict=False))])
                row += [cells(ours), cells(theirs) if theirs else "-"]
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", f"Largest relative difference between ONNX Runtime and PyTorch perplexity: {worst:.1e}.", ""]
    lines += [
        "Best rope share for each size (joint SVD):",
        "",
        "| cache kept | 2-norm | uniform | high | low | best |",
        "|---|---|---|---|---|---|",
    ]
    for ratio in ratios:
        best: dict[str, tuple[list[float], int]] = {}
        for selection in SELECTIONS:
            for dims in rope_choices(site):
                config = make_config(cache_ratio=ratio, selection=selection, rope_dims=dims)
                plans = bench.plans(config)
                if plans is None:
                    continue
                found = bench.torch_perplexities(bench.convert(config, plans))
                if selection not in best or found[0] < best[selection][0][0]:
                    best[selection] = (found, dims)
        row = [f"{cells(best[s][0])} (rope {best[s][1]})" if s in best else "no room" for s in SELECTIONS]
        top = f"**{cells(min(best.values(), key=lambda b: b[0][0])[0])}**" if best else "no room"
        lines.append(f"| {ratio:.2%} | {' | '.join(row)} | {top} |")
    return [*lines, ""]


def plan_default(site: AttentionSite) -> int:
    """Default rope dims of a site."""
    return plan_layers([site], [1 << 30], make_config())[0].rope_dims


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--onnx-ratios", type=float, nargs="*", default=[0.5])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    versions = environment()
    texts = " / ".join(Path(t).name for t in arguments.text)
    lines = [
        "# MHA2MLA without training: the baseline",
        "",
        "Perplexity after conversion by `mha2mla` and nothing else; every later method is to beat these figures.",
        f"Texts: {texts} ({arguments.windows} windows of {arguments.length} tokens each). Calibration (for 2-norm): "
        f"{', '.join(Path(t).name for t in arguments.calibration)}. float32, torch {versions['torch']}, "
        f"onnxruntime {versions.get('onnxruntime')}, {platform.machine()} CPU, {torch.get_num_threads()} thread(s).",
        "",
    ]
    for folder in arguments.model:
        start = time.perf_counter()
        bench = Bench(folder, arguments.calibration, arguments.text, arguments.windows, arguments.length)
        lines += report(bench, Path(folder).name, arguments.ratios, arguments.onnx_ratios)
        print(f"{folder}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    text = "\n".join(lines).rstrip() + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
