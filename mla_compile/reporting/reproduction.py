"""What makes the same files again, from a report: command lines, or Python where the model was handed over in it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mla_compile.config import CompileConfig
from mla_compile.hub import is_hub_id

__all__ = ["reproducing"]

_OTHER_WORDS = {("gradients", False): ["--no-gradients"], ("cache_layout", "paged"): ["--target", "cuda"]}
"""Settings that the command line calls otherwise."""
_NOT_GIVEN = ("schema_version",)
"""Settings that nobody gives."""
_OF_ONNX = ("cache", "inline", "cache_layout", "opset")
"""Settings that the command line takes for an ONNX file for ONNX Runtime alone."""
_CONVERTED = "converted"
"""A folder of a name that says nothing: what the user called it is not known."""
_OF_CHECKPOINTS = ("format", "preset")
"""Settings that say how a model is written, and not how it is converted: a training may lie in between."""
_WRITERS = {".onnx": "to_onnx", ".plan": "to_tensorrt", ".gguf": "to_gguf"}
"""What writes a file from Python, by its suffix."""


def reproducing(report: Mapping[str, Any]) -> Sequence[str]:
    """Lines that make the same files again; ``TEXT`` stands for texts, which a report does not name.

    Args:
        report: What was read of a ``report.json``.
    """
    source = str(report["source"])
    name = source if is_hub_id(source) else Path(source).name  # where a file lay is nobody's business
    written = [n for n in report["artifacts"] if Path(n).suffix in _WRITERS and ".encoder." not in n]
    out = next(iter(sorted(written, reverse=True)), _CONVERTED)
    in_memory, trained_later = report.get("in_memory", False), bool(report.get("before_training"))
    convert = _in_python if in_memory else _in_a_shell
    lines = list(convert(_saved(report), name, _CONVERTED) if trained_later else convert(report, name, out))
    if trained_later:
        lines += _trained(report, out)
    if out.endswith(".onnx") and report.get("kind") is None and not _for_tensorrt(report):
        lines.append(shlex.join(["mla-compile", "run", out, "--prompt", "Once upon a time"]))
        if not in_memory:
            lines.append(shlex.join(["mla-compile", "eval", out, "--text", "OTHER", "--original", name]))
    return lines


def _for_tensorrt(report: Mapping[str, Any]) -> bool:
    return report.get("target") == "tensorrt"


def _own_settings(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings that are not the defaults, of which the operator set's follows from the kind of cache."""
    config = report["config"]
    defaults = CompileConfig().model_dump() | {"opset": CompileConfig(cache=config["cache"]).opset}
    return {k: v for k, v in config.items() if v != defaults.get(k) and k not in _NOT_GIVEN}


def _trained_on(report: Mapping[str, Any]) -> int | None:
    """Tokens that the result was trained on while it was converted; None where it was not."""
    return report["training"]["tokens"] if report.get("training") and not report.get("before_training") else None


def _saved(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The report of a conversion that was saved to be trained, and written in its last form only then."""
    settings = {name: value for name, value in report["config"].items() if name not in _OF_CHECKPOINTS}
    return {**report, "config": settings}


def _trained(report: Mapping[str, Any], out: str) -> Sequence[str]:
    """Lines that train what the conversion left, and write the file or the checkpoint if there is one."""
    settings = _own_settings(report)
    form = [word for name in _OF_CHECKPOINTS if name in settings for word in (f"--{name}", str(settings[name]))]
    exported = "." in out or bool(form)
    lines = [
        f"mla-compile finetune {_CONVERTED} --data TEXT --out finetuned  # settings: recipe.yaml, beside the report"
    ]
    out = "checkpoint" if out == _CONVERTED else out
    return [*lines, *([shlex.join(["mla-compile", "export", "finetuned", "--out", out, *form])] if exported else [])]


def _in_a_shell(report: Mapping[str, Any], name: str, out: str) -> Sequence[str]:
    parts = ["mla-compile", name, "--out", out]
    plain_file = out.endswith(".onnx") and not _for_tensorrt(report)
    if out.endswith(".onnx") and _for_tensorrt(report):
        parts += ["--target", "tensorrt"]
    for setting, value in _own_settings(report).items():
        if setting in _OF_ONNX and not plain_file:
            continue
        words = [f"--{setting.replace('_', '-')}", *([] if isinstance(value, bool) else [str(value)])]
        parts += _OTHER_WORDS.get((setting, value), words)
    if (text := _text(report)) is not None:
        parts += ["--calibration", text]
    if (tokens := _trained_on(report)) is not None:
        parts += ["--finetune", "TEXT", "--finetune-tokens", str(tokens)]
    return [shlex.join(parts)]


def _in_python(report: Mapping[str, Any], name: str, out: str) -> Sequence[str]:
    given = [f"{setting}={value!r}" for setting, value in _own_settings(report).items()]
    if (text := _text(report)) is not None:
        given.append(f"calibration={text!r}")
    if (tokens := _trained_on(report)) is not None:
        given.append(f"finetune='TEXT', finetune_tokens={tokens}")
    folder = "to_deepseek" if report["config"].get("format") == "deepseek" else "save"
    writer = "to_tensorrt" if _for_tensorrt(report) else _WRITERS.get(Path(out).suffix, folder)
    return [
        "import mla_compile",
        f"# model: the {name} that was given, with example_inputs if they were",
        f"compiled = mla_compile.compile({', '.join(['model', *given])})",
        f"compiled.{writer}({out!r})",
    ]


def _text(report: Mapping[str, Any]) -> str | None:
    """The text to calibrate on, if there was some: perplexity was measured on it, perhaps before a training."""
    quality = report.get("quality") or (report.get("before_training") or {}).get("quality")
    if not quality:
        return None
    return "sampled" if quality.get("sampled") else "TEXT"
