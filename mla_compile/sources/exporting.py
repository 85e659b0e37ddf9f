"""Run ``torch.export``, and when it fails say which line of the model's code it failed at, and why.

Torch tells a failure in terms of its own symbols. What a user can act on is the line: the one that made a Python value
of a tensor (its frames are in the traceback), or the one that fixed a size (which torch only logs, when it happens).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mla_compile.errors import LoadError, first_line, reason_of
from mla_compile.quiet import quiet_exporter

__all__ = ["export_module"]

_GUARDS = "torch.fx.experimental.symbolic_shapes"
_NOT_USERS = (str(Path(torch.__file__).parent), str(Path(logging.__file__).parent), str(Path(__file__).parent))


@dataclass(frozen=True)
class _FixedSize:
    """A size that was made a constant: its value, and the line that did it."""

    value: int
    frame: traceback.FrameSummary


def export_module(
    module: nn.Module,
    values: Mapping[str, Any] | tuple[Any, ...],
    shapes: Mapping[str, Any] | tuple[Any, ...],
    source: str,
) -> ExportedProgram:
    """Export a module with dynamic shapes.

    Args:
        module: The module, in the mode it is to be exported in.
        values: Example inputs, by name or by place.
        shapes: Their dynamic shapes, in the same form.
        source: What to call the module.

    Raises:
        LoadError: It cannot be exported; the message names the line at fault where there is one.
    """
    positional, named = ((), values) if isinstance(values, Mapping) else (values, None)

    def export() -> ExportedProgram:
        return torch.export.export(
            module,
            positional,
            None if named is None else dict(named),
            dynamic_shapes=dict(shapes) if isinstance(shapes, Mapping) else shapes,
            strict=False,
        )

    with _plain_outputs(module):
        try:
            with torch.no_grad(), quiet_exporter():
                exported = export()
        except Exception as error:
            _require_fitting(module, values, source)
            raise _explained(error, export, values, source) from error
    _require_any_size(exported, source)
    return exported


@contextlib.contextmanager
def _plain_outputs(module: nn.Module) -> Iterator[None]:
    """Let a module return a dataclass, which the exporter does not know unless it was registered, as a dictionary."""

    def plain(_module: nn.Module, _inputs: object, output: object) -> object:
        if not dataclasses.is_dataclass(output) or isinstance(output, Mapping):
            return output
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        return {name: value for name, value in fields.items() if value is not None}

    handle = module.register_forward_hook(plain)
    try:
        yield
    finally:
        handle.remove()


def _require_any_size(exported: ExportedProgram, source: str) -> None:
    """Refuse a graph that holds for the sizes of its example alone.

    A float that is computed from a size becomes a constant in the graph, and that it does is a guard, which is no part
    of the graph. The guards are asked about larger sizes and about smaller ones: models may allow the former or the
    latter alone. No weights are read, and nothing is computed.

    Raises:
        LoadError: It does.
    """
    module = exported.module()
    guards = getattr(module, "_guards_fn", None)
    if guards is None:
        return
    inputs = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    failed = [error for step in (1, -1) if (error := _failed_guard(guards, inputs, step)) is not None]
    if len(failed) == 2:
        reason = first_line(failed[0]).removeprefix("Guard failed: ")
        raise LoadError(
            f"{source} could not be exported with dynamic batch and length: a number that it computes from them became "
            f"a constant ({reason}).",
            "Compute that number with tensor operations, or from positions.",
        )


def _failed_guard(guards: nn.Module, inputs: Sequence[Any], step: int) -> Exception | None:
    """What the guards say of inputs whose dynamic sizes are all a few more, or less, than those of the example."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    sizes: list[Any] = [size for value in tensors for size in value.shape if not isinstance(size, int)]
    changed = {size.node.expr: size.node.hint + step for size in sizes if size.node.expr.is_symbol}
    given = [
        torch.empty(
            [size if isinstance(size, int) else int(size.node.expr.xreplace(changed)) for size in value.shape],
            dtype=value.dtype,
            device="meta",
        )
        if isinstance(value, Tensor)
        else value
        for value in inputs
    ]
    try:
        guards(*given)
    except Exception as error:  # torch's own, of several kinds
        return error
    return None


def _explained(error: Exception, export: Any, values: Mapping[str, Any] | tuple[Any, ...], source: str) -> LoadError:  # noqa: ANN401
    fixed: list[_FixedSize] = []
    with _watched_guards(fixed), torch.no_grad(), contextlib.suppress(Exception):
        export()  # once more, to see where sizes are fixed: torch tells it to its log alone
    example = next(
        (v for v in (values.values() if isinstance(values, Mapping) else values) if isinstance(v, Tensor)), None
    )
    named = _named_sizes(fixed, example)
    if named:
        place = _place(fixed[-1].frame)
        return LoadError(
            f"{source} could not be exported with dynamic batch and length: {place} works only for a {named}.",
            "Rewrite that line so that it holds for any batch and length.",
        )
    unknown = re.search(r"Found <class '(?:.*\.)?(\w+)'> in output", str(error))
    if unknown:
        return LoadError(
            f"{source} returns a {unknown[1]}, in which the exporter finds no tensors.",
            "Make it return the logits, or a tuple, dictionary or dataclass with them.",
        )
    frame = _users_frame(traceback.extract_tb(error.__traceback__))
    if frame is not None:
        return LoadError(
            f"{source} could not be exported: {_place(frame)} depends on values in a tensor, not only on its shape.",
            "Rewrite that line with tensor operations (torch.where, masks) that work for all values alike.",
        )
    return LoadError(
        f"{source} could not be exported with dynamic batch and length ({reason_of(error)}).",
        "Rewrite the named operation so that it does not depend on a fixed size or on tensor values.",
    )


def _require_fitting(module: nn.Module, values: Mapping[str, Any] | tuple[Any, ...], source: str) -> None:
    """Tell inputs that the module cannot even run on from a module that cannot be exported."""
    try:
        with torch.no_grad():
            module(**values) if isinstance(values, Mapping) else module(*values)
    except Exception as error:
        raise LoadError(
            f"{source} cannot run on the example_inputs it was given ({reason_of(error)}).",
            "Pass token ids [batch, length] in a tuple, e.g. (torch.zeros(2, 8, dtype=torch.long),).",
        ) from error


def _named_sizes(fixed: Sequence[_FixedSize], example: Tensor | None) -> str:
    """The fixed sizes in words, for example ``batch of 2 and a length of 5``."""
    if example is None or example.dim() < 2:
        return ""
    known = {int(example.shape[1]): "length", int(example.shape[0]): "batch"}
    names = dict.fromkeys(f"{known[f.value]} of {f.value}" for f in fixed if f.value in known)
    return " and a ".join(sorted(names))


def _place(frame: traceback.FrameSummary) -> str:
    return f"'{(frame.line or '').split('#')[0].strip()}' ({Path(frame.filename).name}:{frame.lineno}, {frame.name})"


def _users_frame(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The deepest frame of the model's own code: neither torch's, nor generated, nor ours."""
    own = [f for f in frames if not f.filename.startswith(_NOT_USERS) and not f.filename.startswith("<")]
    return own[-1] if own else None


@contextlib.contextmanager
def _watched_guards(found: list[_FixedSize]) -> Iterator[None]:
    """Note the user's line whenever torch replaces a symbolic size by a number."""

    class Watcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            match = re.match(r"set_replacement \w+ = (\d+)", record.getMessage())
            frame = _users_frame(traceback.extract_stack()) if match else None
            if match and frame is not None:
                found.append(_FixedSize(int(match[1]), frame))

    guards, parent = logging.getLogger(_GUARDS), logging.getLogger("torch")
    disabled = logging.root.manager.disable
    before = [(x, x.level, x.propagate, x.handlers) for x in (guards, parent)]
    guards.setLevel(logging.INFO)
    guards.propagate, guards.handlers = False, [Watcher()]
    parent.propagate, parent.handlers = False, [logging.NullHandler()]
    logging.disable(logging.NOTSET)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
