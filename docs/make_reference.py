"""Write the reference pages: `api.md` from docstrings and signatures, `commands.md` from the command line itself.

    python docs/make_reference.py

Plain Markdown, in the tree: it reads the same on a code host, in an editor and on a site, and takes no tool to build.
A test says when a page is not what this would write.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel

HERE = Path(__file__).parent

PUBLIC: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Converting",
        "mla_compile",
        ("compile", "CompiledModel", "CompileConfig", "inspect", "load", "save", "register_pattern"),
    ),
    ("Training", "mla_compile", ("Recipe", "finetune")),
    ("Reports", "mla_compile.report", ("Report", "Quality")),
    ("Running in PyTorch", "mla_compile.runtime.module", ("LatentModel", "LatentOutput")),
    (
        "Kernels for your own decoding loop",
        "mla_compile.runtime",
        ("RowLayout", "LatentCache", "append_latent", "latent_attention"),
    ),
    ("Running in ONNX Runtime", "mla_compile.runtime", ("OnnxDecoder", "onnx_session.open_session")),
    ("Generation with any decoder", "mla_compile.runtime", ("generate.generate", "Sampling", "generate.Decoder")),
    ("TensorRT", "mla_compile.runtime", ("tensorrt.engine_builder.EngineSettings", "TensorRTDecoder")),
    ("Text", "mla_compile.text.corpus", ("read_documents", "tokenize", "token_windows")),
    ("Measuring", "mla_compile.text.evaluate", ("perplexity", "compare", "Perplexity", "Comparison")),
    ("Measuring files and folders by name", "mla_compile.evaluation.measure", ("measure", "Sample", "Measurement")),
    ("Resuming after a kill", "mla_compile.disk.layer_store", ("store_beside",)),
    (
        "Errors",
        "mla_compile.errors",
        (
            "MlaCompileError",
            "UsageError",
            "LoadError",
            "RefusedError",
            "QualityGateError",
            "VerificationError",
            "TrainingError",
            "ShareDone",
        ),
    ),
)
"""What the reference describes: a title, a package, and names in it."""

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")


def public() -> Iterator[tuple[str, str, Any]]:
    """Every public object, with the title it stands under and the name it is imported by."""
    for title, module, names in PUBLIC:
        for name in names:
            inner, _, leaf = name.rpartition(".")
            home = f"{module}.{inner}" if inner else module
            yield title, f"{home}.{leaf}", getattr(importlib.import_module(home), leaf)


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """A class's own public methods and properties, in order."""
    for name, value in vars(kind).items():
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod | staticmethod)):
            yield name, getattr(kind, name)
        elif not name.startswith("_") and isinstance(value, property):
            yield name, value


def sections(docstring: str) -> dict[str, str]:
    """A Google-style docstring in parts, what stands in front of them under the empty name."""
    found, current = {"": ""}, ""
    for line in inspect.cleandoc(docstring).splitlines():
        word = line.rstrip(":")
        if line.endswith(":") and word in SECTIONS:
            current = word
            found[current] = ""
        else:
            found[current] += f"{line}\n"
    return {name: inspect.cleandoc(text) for name, text in found.items()}


def entries(text: str) -> dict[str, str]:
    """Names and what is said of them, of a section that lists them."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        match = None if line.startswith(" ") else re.match(r"([*\w.]+)(?: \([^)]*\))?: (.*)", line)
        if match:
            name = match[1]
            found[name] = match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


def signature(value: Any) -> str:  # noqa: ANN401 - any public object
    """Parameters as they are written, without what only concerns types."""
    if isinstance(value, type) and issubclass(value, BaseModel):
        return "(**settings)"
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    kept = [p.replace(annotation=p.empty) for n, p in found.parameters.items() if n not in ("self", "cls")]
    return (
        str(found.replace(parameters=kept, return_annotation=found.empty))
        .replace("(self, ", "(")
        .replace("(self)", "()")
    )


def _words(text: str) -> str:
    """Roles and double backticks as Markdown has them; a paragraph in one line."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    paragraphs = re.split(r"\n\s*\n", text.replace("``", "`"))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def described(value: Any) -> str:  # noqa: ANN401 - any public object
    """A docstring as Markdown."""
    parts = sections(value.__doc__ or "")
    example = parts.pop("Example", "")
    written = [_words(parts.pop(""))]
    for name, text in parts.items():
        if name in ("Args", "Attributes", "Raises"):
            rows = "\n".join(f"- `{entry}`: {_words(what)}" for entry, what in entries(text).items())
            written.append(f"{'Parameters' if name == 'Args' else name}:\n\n{rows}")
        else:
            written.append(f"{name}: {_words(text)}")
    if example:
        written.append(f"```python\n{inspect.cleandoc(example)}\n```")
    return "\n\n".join(part for part in written if part.strip())


def api_page() -> str:
    """The reference of the Python interface."""
    out = [
        "# Python reference",
        "Made from the docstrings by `docs/make_reference.py`. Anything not listed here may change.",
    ]
    title = ""
    for heading, name, value in public():
        if heading != title:
            out.append(f"## {heading}")
            title = heading
        out.append(f"### {name.rpartition('.')[2]}")
        out.append(f"`{name}{signature(value)}`" if not _is_error(value) else f"`{name}`")
        out.append(described(value))
        if isinstance(value, type) and not _is_error(value):
            for method, function in methods(value):
                shown = f"{method}{signature(function)}" if callable(function) else method
                out.append(f"**`{shown}`**")
                out.append(described(function))
    return "\n\n".join(out) + "\n"


def _is_error(value: Any) -> bool:  # noqa: ANN401 - any public object
    return isinstance(value, type) and issubclass(value, Exception)


def commands_page() -> str:
    """The reference of the command line."""
    from mla_compile.cli import app

    out = [
        "# Commands",
        "Made from `mla-compile --help` by `docs/make_reference.py`. `mla-compile MODEL --out FILE` is short for "
        "`mla-compile convert MODEL --out FILE`.",
    ]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        out += [f"## {name}", _cell(inspect.cleandoc(command.help or ""))]
        panels: dict[str, list[str]] = {"": []}
        for parameter in command.params:
            if parameter.name != "help":
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(_row(parameter))
        for panel, rows in panels.items():
            out += [f"**{panel}**"] * bool(panel)
            out.append("\n".join(["| | | default |", "|---|---|---|", *rows]))
    return "\n\n".join(out) + "\n"


def _row(parameter: Any) -> str:  # noqa: ANN401 - the parser's own
    names = [n for n in (*parameter.opts, *parameter.secondary_opts) if n.startswith("-")]
    shown = ", ".join(f"`{n}`" for n in names) or f"`{parameter.name.upper()}`"
    return f"| {shown} | {_cell(getattr(parameter, 'help', None) or '')} | {_default(parameter)} |"


def _default(parameter: Any) -> str:  # noqa: ANN401 - the parser's own
    if parameter.required:
        return "required"
    if isinstance(getattr(parameter, "show_default", None), str):
        return _cell(parameter.show_default)
    default = parameter.default
    switch = getattr(parameter, "is_flag", False) or getattr(parameter, "count", False)
    if switch or default is None or callable(default) or default in ((), []):  # zeros are defaults worth showing
        return ""
    return f"`{default}`" if getattr(parameter, "show_default", True) else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


PAGES = {"api.md": api_page, "commands.md": commands_page}


def main() -> None:
    """Write both pages."""
    for name, make in PAGES.items():
        (HERE / name).write_text(make())


if __name__ == "__main__":
    main()
