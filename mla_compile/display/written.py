"""What was written from a converted model, how it was checked, and what to do with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_compile.display.console import print_table, say, warn

if TYPE_CHECKING:
    from mla_compile.artifacts.quantised_file import QuantisedFile
    from mla_compile.artifacts.tensorrt import TensorRTFiles


__all__ = [
    "show_check",
    "show_checkpoint",
    "show_commands",
    "show_exported",
    "show_gguf",
    "show_library",
    "show_library_commands",
    "show_quantised",
    "show_written",
    "written_row",
]


def show_exported(report: Mapping[str, Any], out: Path) -> None:
    """What is known of an ONNX file of a saved model, in a line."""
    checked = report["verification"]
    if checked.get("lowering_error") is None:
        say(f"{out}: written, and not compared with the PyTorch module.")
        warn(*report["warnings"])
        return
    error, cost = checked["lowering_error"], checked.get("quantisation_error")
    rounded = "" if cost is None else f" with rows rounded to int8, which changes its logits by {cost:.1e}"
    say(f"{out}: in ONNX Runtime it equals the PyTorch module{rounded} (largest relative difference {error:.1e}).")


def show_checkpoint(report: Mapping[str, Any], out: Path) -> None:
    """What is known of a checkpoint of a saved model, in a line."""
    facts = report["checkpoint"]
    rounded = "" if facts["rounding_error"] is None else f"; rounded to {facts['dtype']}: {facts['rounding_error']:.1e}"
    say(
        f"{out}: in stock transformers it equals the PyTorch module (largest relative difference {facts['error']:.1e}"
        f"{rounded}), and caches {facts['cache_bytes_measured']:g} bytes per token."
    )
    warn(*report["warnings"])


def show_gguf(out: Path, error: float | None) -> None:
    """A file for llama.cpp, and how it was checked."""
    checked = (
        f"in llama.cpp it equals the converted module (largest relative difference {error:.1e})"
        if error is not None
        else "it was not checked, for want of llama-cpp-python or of answers in the folder"
    )
    say(f"{out}: {checked}.")


def show_quantised(out: Path, weights: str, found: QuantisedFile) -> None:
    """A file with weights of fewer bits, and how far it is from the one it was made of."""
    say(
        f"{out}: {weights} weights in {found.operators} operators, {found.bytes_before / 2**20:.1f} -> "
        f"{found.bytes_after / 2**20:.1f} MiB; on random tokens logits change by at most {found.error:.1%} of the "
        f"largest, and {found.greedy:.0%} of the most likely next tokens are the same. What that costs: mla-compile "
        f"eval {out} --text FILE --original MODEL."
    )


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
    print_table(str(path), ["", "result"], rows)


def show_written(written: TensorRTFiles) -> None:
    """What was written for TensorRT, and how it was checked."""
    if written.error is not None:
        say(
            f"{written.onnx}: in ONNX Runtime it equals the PyTorch module (largest relative difference "
            f"{written.error:.1e})."
        )
    if written.plan is not None:
        say(
            f"{written.plan}: it equals the file in ONNX Runtime (largest relative difference "
            f"{written.engine_error:.1e}); attention: {written.attention}."
        )


def show_commands(build: str, inspect: str) -> None:
    """What TensorRT's own tools make of a file for it."""
    say(f"Build an engine of its standard operators with:\n{build}")
    say(f"See what TensorRT takes with:\n{inspect}")


def written_row(written: TensorRTFiles, build: str, inspect: str) -> dict[str, Any]:
    """What was written for TensorRT, how it was checked, and commands to go on with, as data."""
    return {
        "onnx": str(written.onnx),
        "plan": None if written.plan is None else str(written.plan),
        "lowering_error": written.error,
        "engine_error": written.engine_error,
        "attention": written.attention or None,
        "build_command": build,
        "inspect_command": inspect,
    }


def show_library(library: Path, self_registering: bool) -> None:
    """Who takes a library of plugins, and how."""
    if self_registering:
        say(f"{library}: give ONNX Runtime's provider trt_extra_plugin_lib_paths={library}.")
    else:
        say(f"{library}: give it to trtexec with --dynamicPlugins={library}, or load it with load_library().")


def show_library_commands(onnx: Path, library: Path, build: str) -> None:
    """How to go on with a file for a library of plugins."""
    command = f"mla-compile build-plugin {onnx} --tensorrt-include DIR --out {library}"
    say(f"Build its plugins with:\n{command}\nand an engine with them with:\n{build}")
