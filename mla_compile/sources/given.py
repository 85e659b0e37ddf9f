"""What a user gave as a model, looked at before anything is read: whether it is one, or names something that is there.

It may be a module or an exported program, or a name: an archive's, a folder's or a hub id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mla_compile.config import holds_conversion
from mla_compile.disk.writing import require_possible
from mla_compile.errors import LoadError
from mla_compile.hub import is_hub_id
from mla_compile.sources import huggingface
from mla_compile.sources.checkpoint_files import holds_result

__all__ = ["require_model", "require_named", "require_on_hub", "require_unconverted", "require_values"]


_SCRIPT = (torch.jit.ScriptModule, torch.jit.ScriptFunction)


def require_model(model: object) -> None:
    """Refuse what is no model, as far as this machine knows.

    Args:
        model: Anything.

    Raises:
        LoadError: It is neither a module with values in its parameters, nor an exported program, nor a name of
            something that is there.
    """
    if isinstance(model, str | Path):
        require_named(model)
        require_unconverted(model)
        return
    parts = [*model.modules()] if isinstance(model, nn.Module) else [model]
    script = [type(part).__name__ for part in parts if isinstance(part, _SCRIPT)]
    if script:
        raise LoadError(
            f"The model is TorchScript, or has some in it ({script[0]}), whose graph cannot be rewritten.",
            "Pass the nn.Module that it was made from.",
        )
    if any(hasattr(part, "_orig_mod") for part in parts):
        raise LoadError(
            "The model went through torch.compile, or a part of it did, and cannot be exported so.",
            "Pass the module as it was before, which the compiled one holds as _orig_mod.",
        )
    if isinstance(model, nn.Module):
        require_values(model, type(model).__name__)
        _require_here(_tensors(model), type(model).__name__)
    elif isinstance(model, ExportedProgram):
        _require_here(model.state_dict, "the ExportedProgram")
    else:
        raise _no_model(model)


def require_on_hub(model: object) -> None:
    """Refuse a hub id of nothing: its configuration is read, which is little, and what is first read of it anyway.

    Args:
        model: What :func:`require_model` takes for one.

    Raises:
        LoadError: The hub has no such model, or cannot be reached.
    """
    if isinstance(model, str | Path) and is_hub_id(str(model)):
        huggingface.read_config(str(model))


def require_named(source: str | Path) -> None:
    """Refuse a name of nothing on this machine that is no hub id either.

    Raises:
        LoadError: It is one.
    """
    require_possible(source)
    if not Path(source).exists() and not is_hub_id(str(source)):
        raise LoadError(
            f"There is no file or folder '{source}'.", "Give a .pt2 archive, a Hugging Face folder or a hub id."
        )


def require_unconverted(source: str | Path) -> None:
    """Refuse a name of what a conversion wrote: an ONNX file, or a folder.

    Raises:
        LoadError: It is one.
    """
    path = Path(source)
    if path.suffix == ".onnx" and path.is_file():
        raise LoadError(
            f"'{source}' is an ONNX file, which cannot be converted.", "Give the model it was exported from instead."
        )
    if path.is_dir() and holds_conversion(path):
        raise LoadError(
            f"'{source}' is a model that was converted already.", "Give the model it was converted from instead."
        )
    if path.is_dir() and holds_result(path):
        beside = ", and beside it the configuration of its original" if (path / "config.json").is_file() else ""
        raise LoadError(
            f"'{source}' holds a converted model in a file{beside}.",
            "Give the model it was converted from, or name the file.",
        )


def require_values(module: nn.Module, source: str) -> None:
    """Refuse a module whose weights are only shapes.

    Args:
        module: The module.
        source: What to call it.

    Raises:
        LoadError: Some of its parameters or buffers are on the device ``meta``.
    """
    everything = _tensors(module)
    empty = [name for name, value in everything.items() if value.is_meta]
    if empty:
        raise LoadError(
            f"{len(empty)} of {len(everything)} parameters and buffers of {source} have no values, '{empty[0]}' among "
            "them: they are on the device meta.",
            "Put weights into it first, e.g. with load_state_dict(..., assign=True).",
        )


def _require_here(values: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are on an accelerator.

    Raises:
        LoadError: Some are.
    """
    elsewhere = [(name, value.device) for name, value in values.items() if value.device.type not in ("cpu", "meta")]
    if elsewhere:
        name, device = elsewhere[0]
        raise LoadError(
            f"Weights of {source} are on the device {device}, '{name}' among them; a conversion reads them on the CPU.",
            f"Pass the model as model.cpu(). With device='{device.type}' a conversion computes there all the same.",
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _no_model(model: object) -> LoadError:
    kind = type(model).__name__
    if isinstance(model, type):
        return LoadError(f"{model.__name__} is a class, not a model.", "Pass an instance of it, with its weights.")
    if isinstance(model, Mapping) and model and all(isinstance(value, Tensor) for value in model.values()):
        return LoadError(
            f"The model is a mapping of {len(model)} tensors: weights, but nothing that uses them.",
            "Pass the nn.Module they are of, with the weights in it (load_state_dict).",
        )
    if callable(model):
        named = getattr(model, "__name__", kind)
        return LoadError(
            f"The model is a function or another callable ('{named}'), in which no weights can be found.",
            "Pass an nn.Module that has the weights and calls it.",
        )
    return LoadError(
        f"The model is of type {kind}, which is none that can be read.",
        "Pass an nn.Module, an ExportedProgram, or the name of a .pt2 archive, Hugging Face folder or hub id.",
    )
