"""What was done to a model, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mla_compile.display.console import print_table, warn

if TYPE_CHECKING:
    from mla_compile.report import Report
    from mla_compile.reporting.encoder_report import EncoderReport
    from mla_compile.reporting.seq2seq_report import Seq2SeqReport


__all__ = ["show_encoder_report", "show_report", "show_seq2seq_report", "show_training"]

_MUCH = 1.05
"""Growth of perplexity from which ways to a smaller one are named."""


_Rows: TypeAlias = list[list[object]]


def show_report(report: Report, out: Path) -> None:
    """What was done, in a few lines."""
    rows = [
        *_layer_rows(report),
        *_quality_rows(report),
        *_verification_rows(report),
        *_checkpoint_rows(report),
        _written_row(report.artifacts, str(out)),
    ]
    rows += _page_row(out)
    if report.quality and report.quality.ratio > _MUCH:
        trained = "" if report.polish or report.training else ", --polish-steps 128, or mla-compile finetune"
        rows.append(["to lose less", f"a larger --cache-ratio{trained}"])
    print_table(report.source, ["", "result"], rows)
    _show_errors(report)
    warn(*report.warnings)


def _page_row(out: Path) -> _Rows:
    """Where the page of what was written is, if there is one."""
    from mla_compile.reporting.report_page import PAGE

    page = (out if out.is_dir() else out.parent) / PAGE
    return [["to look at", page]] if page.is_file() else []


def _layer_rows(report: Report) -> _Rows:
    """Which layers were converted, how, and what a token of cache takes."""
    kept = f", {len(report.kept)} kept" if report.kept else ""
    cache = f"{report.cache_bytes_before} -> {report.cache_bytes_after} ({report.cache_ratio:.2%})"
    rows: _Rows = [
        ["attention layers", f"{len(report.plans)} converted{kept}"],
        _method_row(report),
        ["cache bytes per token", cache],
    ]
    for window, layers in report.windows.items():
        rows.append([f"{layers} layers with a window", f"cache the last {window - 1} tokens at most"])
    return rows


def _quality_rows(report: Report) -> _Rows:
    """What training and the conversion changed, on text."""
    rows: _Rows = []
    if report.polish:
        p = report.polish
        rows.append([f"divergence, {p.steps} polish steps", f"{p.before:.4f} -> {p.after:.4f} nats per token"])
    if report.training:
        t = report.training
        name = f"held-out loss, {t.tokens:,} tokens of training"
        rows.append([name, f"{t.before:.4f} -> {t.after:.4f} nats per token"])
    if report.quality:
        q = report.quality
        name = f"perplexity, {q.text} text"
        rows.append([name, f"{q.original:.4f} -> {q.converted:.4f} (x{q.ratio:.3f}, {q.tokens} tokens)"])
    return rows


def _verification_rows(report: Report) -> _Rows:
    """How far apart the original, the rewrite, the conversion and the file are."""
    v = report.verification
    if v is None:
        return []
    rows: _Rows = [
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
    if report.config.get("exact"):
        rows.append(["converted vs original", f"{v.conversion_error:.1e}, greedy {v.conversion_greedy:.0%} equal"])
    else:  # where texts part they stay apart, so that equal tokens would say nothing
        rows.append(["largest change of a logit by what was left out", f"{v.conversion_error:.0%} of the largest"])
    return [*rows, ["measured cache bytes per token", v.cache_bytes_per_token]]


def _checkpoint_rows(report: Report) -> _Rows:
    """What a DeepSeek checkpoint holds, and how it was checked."""
    c = report.checkpoint
    if c is None:
        return []
    rows: _Rows = [
        ["checkpoint", f"DeepSeek-V3, latent {c.latent}, rope {c.rope}: {c.cache_bytes_per_token} bytes per token"],
        ["transformers vs PyTorch", f"{c.error:.1e}, greedy {c.greedy:.0%} equal"],
        ["cache in transformers, measured", f"{c.cache_bytes_measured:g} bytes per token"],
        ["norm of the latent changes it by", f"{c.norm_error:.1e} at most, {c.norm_error_measured:.1e} on the text"],
    ]
    if c.rounding_error is not None:
        rows.append([f"weights in {c.dtype} change logits by", f"{c.rounding_error:.1e}"])
    if c.llama_cpp_error is not None:
        rows.append(["llama.cpp vs PyTorch", f"{c.llama_cpp_error:.1e}"])
    return rows


def _written_row(artifacts: Mapping[str, int], files: str) -> list[object]:
    return ["written", f"{files} ({sum(artifacts.values()) / 2**20:.1f} MiB)"]


def _method_row(report: Report) -> list[object]:
    """How sizes were chosen, and what they are."""
    method = report.config["method"]
    if method == "mha2mla":
        return ["selection", f"{report.selection}, {report.plans[0].rope_dims} rotating channels per head"]
    dims, ranks = (sorted({getattr(p, name) for p in report.plans}) for name in ("rope_dims", "kv_rank"))
    shown = [str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in (dims, ranks)]
    return ["method", f"{method}: {shown[0]} rotating channels shared by all heads, ranks {shown[1]}"]


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
        print_table("Each layer by itself (losses in nats per token)", columns, rows)


def _nats(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def show_encoder_report(report: EncoderReport, out: Path) -> None:
    """What was done to an encoder, in a few lines."""
    kept = f", {len(report.kept)} stay as they are" if report.kept else ""
    rows: _Rows = [["attention layers", f"{len(report.plans)} converted{kept}"], ["cache", "none"]]
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
    rows.append(_written_row(report.artifacts, str(out)))
    rows += _page_row(out)
    print_table(report.source, ["", "result"], rows)
    warn(*report.warnings)


def show_seq2seq_report(report: Seq2SeqReport, out: Path) -> None:
    """What was done to an encoder-decoder, in a few lines."""
    converted = f"{len(report.plans)} self and {len(report.cross_plans)} cross converted"
    rows: _Rows = [["attention layers of the decoder", converted]]
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
    rows.append(_written_row(report.artifacts, f"{out} and {out.with_suffix('.encoder.onnx').name}"))
    rows += _page_row(out)
    print_table(report.source, ["", "result"], rows)
    warn(*report.warnings)


def show_training(report: Mapping[str, Any], out: Path) -> None:
    """What fine-tuning did, in a few lines and a curve."""
    import math

    from mla_compile.report import NO_GAIN

    t = report["training"]
    before, after = (f"{t[key]:.4f} (perplexity {math.exp(min(t[key], 700.0)):.4f})" for key in ("before", "after"))
    rows: _Rows = [
        ["trained", f"{t['train']}, towards {t['objective']}"],
        ["tokens", f"{t['tokens']:,} in {t['steps']} steps; the weights of step {t['best_step']}"],
        [f"held-out loss, {t['held_out_tokens']} tokens", f"{before} -> {after}"],
        _written_row(report["artifacts"], str(out)),
    ]
    print_table(report["source"], ["", "result"], rows)
    # The kept step is the one with the least objective, which has a unit of its own where it is not the text.
    towards = {} if t["objective"] == "next-token" else {f"held-out {_objective(t['objective'])}": "objective"}
    columns = {"training loss": "loss", **towards, "held-out loss (nats per token)": "held_out"}
    curve = [[p["step"], p["tokens"], *(_nats(p[name]) for name in columns.values())] for p in t["curve"]]
    print_table("Curve", ["step", "tokens", *columns], curve)
    if t["best_step"] == 0:
        warn(NO_GAIN)


def _objective(spelled: str) -> str:
    """An objective with its unit."""
    units = {"kl": " (nats per token)", "attention": " (squared error, relative)"}
    return spelled + units.get(spelled, " (weighted sum)")
