"""What a person sees: progress, tables and summaries; rich on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from mla_compile.bench import Benchmark, Spread
    from mla_compile.conversion_cost import ConversionCost
    from mla_compile.cost import DecodeStep, LayerCost
    from mla_compile.encoder_report import EncoderReport
    from mla_compile.measure import Measurement
    from mla_compile.plan import LatentPlan
    from mla_compile.progress import StageTiming
    from mla_compile.report import Report
    from mla_compile.seq2seq_report import Seq2SeqReport
    from mla_compile.tensorrt import Written
    from mla_compile.textgen import Generation

__all__ = [
    "StageDisplay",
    "conversion_row",
    "generation_row",
    "make_display",
    "plan_rows",
    "show_benchmark",
    "show_check",
    "show_commands",
    "show_conversion",
    "show_encoder_report",
    "show_exported",
    "show_generation",
    "show_layers",
    "show_library_commands",
    "show_measurement",
    "show_plan",
    "show_report",
    "show_seq2seq_report",
    "show_training",
    "show_written",
    "stream_text",
]


_SLOWED = 1.001
"""From this on frequencies are called slowed."""
_SCALED = 1e-4
"""Relative difference from one over the root of the head's size from which a logit scale is shown."""


class StageDisplay:
    """Shows stages on standard error: bars on a terminal, one line per finished stage otherwise.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bars = (
            Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<16}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[steps]:>9}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            if self._console.is_terminal and not quiet
            else None
        )
        self._task: Any = None

    def __enter__(self) -> StageDisplay:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def started(self, name: str, total: int | None) -> None:
        """A stage begins."""
        if self._bars:
            self._task = self._bars.add_task(name, total=total, steps=f"0/{total}" if total else "", note="")

    def advanced(self, note: str) -> None:
        """One step is done."""
        if self._bars:
            task = self._bars.tasks[-1]
            steps = f"{int(task.completed) + 1}/{int(task.total or 0)}"
            self._bars.update(self._task, advance=1, steps=steps, note=note)

    def told(self, line: str) -> None:
        """Something is said while the stage goes on."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def finished(self, timing: StageTiming) -> None:
        """A stage is done."""
        if self._bars:
            self._bars.remove_task(self._task)
        line = f"{timing.name:<16} {timing.seconds:7.1f} s   peak {timing.peak_mib:,.0f} MiB   {timing.note}".rstrip()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def make_display(quiet: bool) -> StageDisplay:
    """Choose how to show progress."""
    return StageDisplay(quiet)


def _print_table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on a terminal, tab-separated lines otherwise."""
    console = Console()
    cells = [["" if c is None else str(c) for c in row] for row in rows]
    if not console.is_terminal:
        for line in ([*columns], *cells):
            print("\t".join(line))  # noqa: T201 - this is the output
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in cells:
        table.add_row(*line)
    console.print(table)


def show_layers(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row per attention layer, recognised or not."""
    if not rows:
        print("No attention was found.")  # noqa: T201
        return
    lines = []
    for row in rows:
        if "rejected" in row and "kind" not in row:
            cached = row.get("elements_per_token", "")
            verdict = f"kept: {row['rejected']}" if row["kept"] else f"no: {row['rejected']}"
            lines.append([row["index"], row["path"], verdict, row["reason"], "", "", "", cached, ""])
            continue
        rope = _rope_in_words(row)
        heads = f"{row['heads']} q / {row['kv_heads']} kv of {row['qk_dim']}"
        names = dict.fromkeys(str(row[r]).removeprefix(f"{row['path']}.") for r in ("query", "key", "value"))
        weights = ", ".join(names) + (" (biased)" if row["bias"] else "")
        cached = row["cache"]
        if row["elements_per_token"]:
            lossless = row["lossless_elements_per_token"] / row["elements_per_token"]
            cached = f"{row['elements_per_token']}" + (f" (lossless: {lossless:.0%})" if lossless < 1 else "")
        verdict = f"no: {row['rejected']}" if "rejected" in row else "yes"
        lines.append([row["index"], row["path"], verdict, heads, rope, row["mask"], _extras(row), cached, weights])
    columns = ["#", "layer", "converts", "heads", "rope", "mask", "also", "cached/token", "weights"]
    _print_table("Attention layers", columns, lines)


def _rope_in_words(row: Mapping[str, Any]) -> str:
    """Layout, channels, base, and how much slower the frequencies are than the base says."""
    if not row["rotary_dim"]:
        return "none"
    words = f"{row['rope']}:{row['rotary_dim']}"
    if row["rope_theta"] is None:
        return words
    least, most = row["rope_slowing"]
    slowed = "" if most < _SLOWED else f", slowed {most:.3g}x" if least > _SLOWED else f", slowed up to {most:.3g}x"
    return f"{words}, theta {row['rope_theta']:.6g}{slowed}"


def _extras(row: Mapping[str, Any]) -> str:
    """What a layer has beyond plain attention, in a few words."""
    found = []
    plain = row["qk_dim"] ** -0.5
    if row["logit_scale"] is not None and abs(row["logit_scale"] / plain - 1) > _SCALED:
        found.append(f"logits x{row['logit_scale'] / plain:.4g}")
    if row["query_norm"] or row["key_norm"]:
        found.append(f"qk-norm {row['key_norm'] or row['query_norm']}")
    if row["value_norm"]:
        found.append(f"v-norm {row['value_norm']}")
    if row["softcap"]:
        found.append(f"soft-cap {row['softcap']:g}")
    if row["sinks"]:
        found.append("sinks")
    if row["alibi"]:
        found.append("ALiBi")
    return ", ".join(found)


_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


def plan_rows(
    plans: Sequence[LatentPlan],
    costs: Sequence[LayerCost],
    step: DecodeStep,
    cache_type: str = "float32",
    source_type: str = "float32",
) -> dict[str, Any]:
    """A plan as data; bytes are of ``source_type`` before and ``cache_type`` after, those of ``costs`` of its own."""
    import dataclasses

    from mla_compile.plan import cache_elements

    before = _ITEMSIZES[source_type] * cache_elements(plans)[0]
    after = sum(_bytes_after(p, cache_type) for p in plans)
    decode = {**dataclasses.asdict(step), "layers": [dataclasses.asdict(c) for c in costs]}
    return {
        "layers": [{**dataclasses.asdict(p), "elements_after": p.elements_after} for p in plans],
        "bytes_per_token_before": before,
        "bytes_per_token_after": after,
        "cache_ratio": after / before,
        "decode_step": decode if costs else None,
    }


def _bytes_after(plan: LatentPlan, cache_type: str) -> int:
    from mla_compile.runtime.onnx_quantised import quantised_bytes

    if cache_type == "int8":
        return quantised_bytes([plan.elements_after])
    return _ITEMSIZES[cache_type] * plan.elements_after


def show_plan(
    plans: Sequence[LatentPlan],
    costs: Sequence[LayerCost],
    step: DecodeStep,
    cached: str | None = "float32",
    source_type: str = "float32",
) -> None:
    """One row per layer and the sum; ``cached`` is the cache's type, ``source_type`` the original's.

    It is None for an encoder, whose keys and values are not cached, and in which nothing is a step.
    """
    from mla_compile.cost import slower_layers

    columns = ["#", "layer", "rope dims", "rank", "exact rank"]
    columns += ["bytes/token before" if cached else "key and value bytes", "after"]
    rows: list[list[object]] = [
        [
            p.site,
            p.path,
            f"{p.rope_groups} x {p.rope_dims}",
            p.kv_rank,
            p.exact_rank,
            _ITEMSIZES[source_type] * p.elements_before,
            _bytes_after(p, cached or "float32"),
        ]
        for p in plans
    ]
    total = plan_rows(plans, costs, step, cached or "float32", source_type)
    before, after = total["bytes_per_token_before"], total["bytes_per_token_after"]
    rows.append(["", "all", "", "", "", before, f"{after} ({total['cache_ratio']:.2%})"])
    title = f"Plan ({cached} cache)" if cached else "Plan (no cache)"
    if costs:
        title += f"; a step: {step.context} tokens, batch {step.batch}, {step.machine.name}, estimated"
        columns += ["MFLOP/step before", "after", "speed"]
        for row, cost in zip(rows, costs, strict=False):
            row += [f"{part.attention_operations / 1e6:,.1f}" for part in (cost.before, cost.after)]
            row.append(f"x{cost.speedup:.2f}")
        rows[-1] += ["", "", ""]
    _print_table(title, columns, rows)
    if slower := slower_layers(costs, step):
        print(f"warning: {slower}", file=sys.stderr)  # noqa: T201


def conversion_row(cost: ConversionCost | None, alike: tuple[int, int] | None) -> dict[str, Any]:
    """What a conversion takes, and how it is known, as data."""
    import dataclasses

    layers = None if alike is None else {"layers": alike[0], "exported": alike[1]}
    return {"conversion": None if cost is None else dataclasses.asdict(cost), "alike": layers}


def show_conversion(cost: ConversionCost | None, alike: tuple[int, int] | None) -> None:
    """A line each."""
    if alike is not None:
        print(f"{alike[0]} layers, of which the first {alike[1]} show all kinds and were exported")  # noqa: T201
    if cost is not None:
        print(  # noqa: T201
            f"converting it takes about {cost.seconds / 60:,.0f} minutes besides verification "
            f"({cost.operations / 1e12:,.1f} TFLOP in float64 by one core), reads {cost.weight_bytes / 1e9:,.1f} GB, "
            f"writes {cost.written_bytes / 1e9:,.1f} GB and holds {cost.memory_bytes / 1e9:,.1f} GB (estimated)"
        )


def _method_row(report: Report) -> list[object]:
    """How sizes were chosen, and what they are."""
    method = report.config["method"]
    if method == "mha2mla":
        return ["selection", f"{report.selection}, {report.plans[0].rope_dims} rotating channels per head"]
    dims, ranks = (sorted({getattr(p, name) for p in report.plans}) for name in ("rope_dims", "kv_rank"))
    shown = [str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in (dims, ranks)]
    return ["method", f"{method}: {shown[0]} rotating channels shared by all heads, ranks {shown[1]}"]


def show_exported(verification: Mapping[str, Any], out: Path) -> None:
    """What is known of an ONNX file of a saved model, in a line."""
    error, cost = verification["lowering_error"], verification.get("quantisation_error")
    rounded = "" if cost is None else f" with rows rounded to int8, which changes its logits by {cost:.1e}"
    print(  # noqa: T201
        f"{out}: in ONNX Runtime it equals the PyTorch module{rounded} (largest relative difference {error:.1e})."
    )


def show_report(report: Report, out: Path) -> None:
    """What was done, in a few lines."""
    rows: list[list[object]] = [
        ["attention layers", f"{len(report.plans)} converted" + (f", {len(report.kept)} kept" if report.kept else "")],
        _method_row(report),
        [
            "cache bytes per token",
            f"{report.cache_bytes_before} -> {report.cache_bytes_after} ({report.cache_ratio:.2%})",
        ],
    ]
    for window, layers in report.windows.items():
        rows.append([f"{layers} layers with a window", f"cache the last {window - 1} tokens at most"])
    if report.polish:
        p = report.polish
        rows.append([f"divergence, {p.steps} polish steps", f"{p.before:.4f} -> {p.after:.4f} nats per token"])
    if report.training:
        t = report.training
        rows.append(
            [f"held-out loss, {t.tokens:,} tokens of training", f"{t.before:.4f} -> {t.after:.4f} nats per token"]
        )
    if report.quality:
        quality = report.quality
        rows.append(
            [
                f"perplexity, {'held-out' if quality.held_out else 'calibration'} text",
                f"{quality.original:.4f} -> {quality.converted:.4f} (x{quality.ratio:.3f}, {quality.tokens} tokens)",
            ]
        )
    if report.verification:
        v = report.verification
        rows += [
            ["rewrite at full rank vs original", f"{v.rewrite_error:.1e}"],
            ["decode vs whole sequence", f"{v.decode_error:.1e}"],
        ]
        if v.rounding is not None:
            rows.append(["roundings of the type, original -> converted", "{:.1e} -> {:.1e}".format(*v.rounding)])
        if v.lowering_error is not None:
            greedy = "" if v.lowering_greedy is None else f", greedy {v.lowering_greedy:.0%} equal"
            copied = " (a float32 copy of the file)" if v.lowering_copy else ""
            rows.append(["ONNX Runtime vs PyTorch", f"{v.lowering_error:.1e}{greedy}{copied}"])
        if v.lowering_rounding is not None:
            rows.append(["roundings of the file in ONNX Runtime", f"{v.lowering_rounding:.1e}"])
        if v.quantisation_error is not None:
            rows.append(["int8 cache vs float32 cache, PyTorch", f"{v.quantisation_error:.1e}"])
        if v.engine_error is not None:
            rows.append(["TensorRT vs ONNX Runtime", f"{v.engine_error:.1e}"])
        rows.append(["converted vs original", f"{v.conversion_error:.1e}, greedy {v.conversion_greedy:.0%} equal"])
        rows.append(["measured cache bytes per token", v.cache_bytes_per_token])
    if report.checkpoint:
        c = report.checkpoint
        rows += [
            ["checkpoint", f"DeepSeek-V3, latent {c.latent}, rope {c.rope}: {c.cache_bytes_per_token} bytes per token"],
            ["transformers vs PyTorch", f"{c.error:.1e}, greedy {c.greedy:.0%} equal"],
            ["cache in transformers, measured", f"{c.cache_bytes_measured:g} bytes per token"],
            [
                "norm of the latent changes it by",
                f"{c.norm_error:.1e} at most, {c.norm_error_measured:.1e} on the text",
            ],
        ]
        if c.rounding_error is not None:
            rows.append([f"weights in {c.dtype} change logits by", f"{c.rounding_error:.1e}"])
        if c.llama_cpp_error is not None:
            rows.append(["llama.cpp vs PyTorch", f"{c.llama_cpp_error:.1e}"])
    rows.append(["written", f"{out} ({sum(report.artifacts.values()) / 2**20:.1f} MiB)"])
    _print_table(report.source, ["", "result"], rows)
    _show_errors(report)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201


def show_training(report: Mapping[str, Any], out: Path) -> None:
    """What fine-tuning did, in a few lines and a curve."""
    import math

    t = report["training"]
    before, after = (f"{t[key]:.4f} (perplexity {math.exp(min(t[key], 700.0)):.4f})" for key in ("before", "after"))
    rows: list[list[object]] = [
        ["trained", f"{t['train']}, towards {t['objective']}"],
        ["tokens", f"{t['tokens']:,} in {t['steps']} steps; the weights of step {t['best_step']}"],
        [f"held-out loss, {t['held_out_tokens']} tokens", f"{before} -> {after}"],
        ["written", f"{out} ({sum(report['artifacts'].values()) / 2**20:.1f} MiB)"],
    ]
    _print_table(report["source"], ["", "result"], rows)
    curve = [[p["step"], p["tokens"], _nats(p["loss"]), _nats(p["held_out"])] for p in t["curve"]]
    _print_table("Curve (nats per token)", ["step", "tokens", "training loss", "held-out loss"], curve)


def _show_errors(report: Report) -> None:
    """One row per converted layer, where there was text to measure on."""
    rows = [
        [
            plan.site,
            plan.path,
            f"{plan.rope_groups} x {plan.rope_dims}",
            plan.kv_rank,
            _nats(forecast.predicted_loss),
            _nats(error.loss),
            f"{error.output:.1%}",
        ]
        for plan, forecast, error in zip(report.plans, report.forecasts, report.layer_errors, strict=False)
    ]
    if rows:
        columns = ["#", "layer", "rope dims", "rank", "predicted loss", "measured loss", "output error"]
        _print_table("Each layer by itself (losses in nats per token)", columns, rows)


def _nats(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def show_check(path: Path, found: Mapping[str, float | None]) -> None:
    """How a checkpoint answers."""
    written = {
        "error": ("logits vs the converted module", "{:.1e}"),
        "greedy": ("greedy tokens", "{:.0%} equal"),
        "cache_bytes_per_token": ("cache, bytes per token in float32", "{:g}"),
        "norm_error": ("norm of the latent changes it by", "{:.1e}"),
        "without_biases": ("leaving out biases of attention would cost", "{:.2g} nats per token"),
    }
    rows = [[text, form.format(found[key])] for key, (text, form) in written.items() if found.get(key) is not None]
    _print_table(str(path), ["", "result"], rows)


def show_gguf(out: Path, error: float | None) -> None:
    """A file for llama.cpp, and how it was checked."""
    checked = (
        f"in llama.cpp it equals the converted module (largest relative difference {error:.1e})"
        if error is not None
        else "it was not checked, for want of llama-cpp-python or of answers in the folder"
    )
    print(f"{out}: {checked}.")  # noqa: T201


def show_written(written: Written) -> None:
    """What was written for TensorRT, and how it was checked."""
    if written.error is not None:
        print(  # noqa: T201
            f"{written.onnx}: in ONNX Runtime it equals the PyTorch module (largest relative difference "
            f"{written.error:.1e})."
        )
    if written.plan is not None:
        print(  # noqa: T201
            f"{written.plan}: it equals the file in ONNX Runtime (largest relative difference "
            f"{written.engine_error:.1e}); attention: {written.attention}."
        )


def show_commands(build: str, inspect: str) -> None:
    """What TensorRT's own tools make of a file for it."""
    print(f"Build an engine of its standard operators with:\n{build}")  # noqa: T201
    print(f"See what TensorRT takes with:\n{inspect}")  # noqa: T201


def show_library_commands(onnx: Path, library: Path, build: str) -> None:
    """How to go on with a file for a library of plugins."""
    command = f"mla-compile build-plugin {onnx} --tensorrt-include DIR --out {library}"
    print(f"Build its plugins with:\n{command}\nand an engine with them with:\n{build}")  # noqa: T201


def show_encoder_report(report: EncoderReport, out: Path) -> None:
    """What was done to an encoder, in a few lines."""
    kept = f", {len(report.kept)} stay as they are" if report.kept else ""
    rows: list[list[object]] = [["attention layers", f"{len(report.plans)} converted{kept}"], ["cache", "none"]]
    for name, (before, after) in (
        ("parameters", report.parameters),
        ("multiplications per token, keys and values", report.multiplications),
    ):
        rows.append([name, f"{before} -> {after} ({after / before:.2%})"])
    if report.verification:
        v = report.verification
        rows.append(["rewrite at full rank vs original", f"{v.rewrite_error:.1e}"])
        if v.lowering_error is not None:
            rows.append(["ONNX Runtime vs PyTorch", f"{v.lowering_error:.1e}"])
        rows.append(["converted vs original", f"{v.conversion_error:.1e}"])
    rows.append(["written", f"{out} ({sum(report.artifacts.values()) / 2**20:.1f} MiB)"])
    _print_table(report.source, ["", "result"], rows)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201


def show_seq2seq_report(report: Seq2SeqReport, out: Path) -> None:
    """What was done to an encoder-decoder, in a few lines."""
    converted = f"{len(report.plans)} self and {len(report.cross_plans)} cross converted"
    rows: list[list[object]] = [["attention layers of the decoder", converted]]
    for name, (before, after) in (
        ("cache bytes per decoder token", report.cache_bytes),
        ("cross cache bytes per encoder token", report.cross_cache_bytes),
    ):
        rows.append([name, f"{before} -> {after} ({after / before:.2%})"])
    if report.verification:
        v = report.verification
        rows.append(["rewrite at full rank vs original", f"{v.rewrite_error:.1e}"])
        rows.append(["decode vs whole sequence", f"{v.decode_error:.1e}"])
        if v.lowering_error is not None:
            rows.append(["ONNX Runtime vs PyTorch", f"{v.lowering_error:.1e}"])
        rows.append(["converted vs original", f"{v.conversion_error:.1e}"])
    files = f"{out} and {out.with_suffix('.encoder.onnx').name}"
    rows.append(["written", f"{files} ({sum(report.artifacts.values()) / 2**20:.1f} MiB)"])
    _print_table(report.source, ["", "result"], rows)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201


def show_measurement(result: Measurement) -> None:
    """One row per model, the original first; columns that nothing is known of are left out."""
    original = result.original
    columns = ["", "runtime", "tokens", "cache bytes/token", "cache kept", "perplexity", "ratio", "KL", "top-1"]
    rows = [
        [
            "original" if m is original else m.model.name,
            m.model.runtime,
            str(result.tokens),
            "unknown" if (cached := m.model.cache_bytes) is None else str(cached),
            _percent(m.kept(original)),
            f"{m.found.perplexity.value:.4f}",
            "" if (ratio := m.ratio(original)) is None else f"{ratio:.4f}",
            "" if original in (None, m) else f"{m.found.kl:.5f}",
            "" if original in (None, m) else _percent(m.found.top1),
        ]
        for m in ([] if original is None else [original]) + [*result.models]
    ]
    told = [place for place, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    _print_table(None, [columns[place] for place in told], [[row[place] for place in told] for row in rows])
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201


def show_benchmark(result: Benchmark) -> None:
    """Files, prompts and steps: a table of each."""

    def ratio(found: Spread) -> str:
        return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"

    _print_table(
        f"{result.original}, {result.threads} thread(s)",
        ["file", "load, s", "peak memory, MiB", "cache bytes/token"],
        [
            [
                _benched(f.name, f.original),
                f"{f.load_seconds:.2f}",
                f"{f.peak_bytes / 2**20:,.0f}",
                f.cache_bytes_per_token,
            ]
            for f in result.files
        ],
    )
    originals = {f.name: f.original for f in result.files}
    _print_table(
        f"A prompt ({result.clock}), and how many times as fast as the fastest original (quartiles)",
        ["prompt", "file", "seconds", "tokens/s", "speed"],
        [
            [
                p.tokens,
                _benched(p.file, originals[p.file]),
                f"{p.seconds:.3f}",
                f"{p.tokens / p.seconds:,.0f}",
                ratio(p.speedup),
            ]
            for p in result.prefills
        ],
    )
    _print_table(
        f"A new token ({result.clock}), and how many times as fast as the fastest original (quartiles)",
        ["context", "batch", "file", "ms", "tokens/s", "cache bytes", "speed"],
        [
            [
                s.context,
                s.batch,
                _benched(s.file, originals[s.file]),
                f"{1e3 * s.seconds:.2f}",
                f"{s.tokens_per_second:,.1f}",
                s.cache_bytes,
                ratio(s.speedup),
            ]
            for s in result.steps
        ],
    )
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)  # noqa: T201


def _benched(name: str, original: bool) -> str:
    return f"original, {name}" if original else name


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def generation_row(result: Generation) -> dict[str, Any]:
    """Generated texts as data."""
    return {
        "texts": list(result.texts),
        "new_tokens": list(result.new_tokens),
        "tokens_per_second": result.tokens_per_second,
        "cache_bytes_per_token": result.cache_bytes_per_token,
        "cache_bytes": result.cache_bytes,
    }


def stream_text(piece: str) -> None:
    """Show a piece of text as it arrives."""
    print(piece, end="", flush=True)  # noqa: T201


def show_generation(result: Generation, streamed: bool) -> None:
    """The texts, unless they were streamed, and the speed."""
    print("" if streamed else "\n\n".join(result.texts))  # noqa: T201
    Console(stderr=True).print(
        f"{sum(result.new_tokens)} tokens, {result.tokens_per_second:.0f} tokens/s, "
        f"{result.cache_bytes_per_token} cache bytes per token, {result.cache_bytes} in all",
        highlight=False,
    )
