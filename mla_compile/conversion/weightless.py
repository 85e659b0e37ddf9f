"""A model from its configuration alone: built without weights, exported and recognised as if it had them.

Parameters are fake (shapes and types, no numbers) and buffers real, because recognition reads position tables and needs
no weight but the gains of norms, for which ones stand in. A deep model is exported with as few layers as show all of
its kinds of layers; two layers are of one kind if their modules are equal in classes, shapes, buffers, numbers and
words, and the configuration says the same of both wherever it says something layer by layer.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mla_compile.config import holds_conversion
from mla_compile.passes.recognise import Recognition, recognise
from mla_compile.program import AnyProgram
from mla_compile.site import AttentionSite, Projection, Rejection
from mla_compile.sources import huggingface
from mla_compile.sources.capture import capture_any
from mla_compile.sources.checkpoint_files import has_weights, holds_result

__all__ = ["WeightlessModel", "draw", "is_weightless"]

_PLACES = frozenset({"layer_idx", "layer_index", "layer_id", "layer_number", "idx", "training"})
"""Attributes that say which layer it is, not what it is."""


@dataclass(frozen=True)
class WeightlessModel:
    """What is known of a model without its weights.

    Attributes:
        program: The model, of fewer layers where they repeat; its parameters have no numbers.
        found: Attention layers of the whole model; graph nodes are those of the layer's like in ``program``.
        parameters: Numbers in all weights of the whole model.
        layers: Layers of the whole model, 0 where they could not be told apart from the rest.
        exported: Layers that were exported.
    """

    program: AnyProgram
    found: Recognition
    parameters: int
    layers: int
    exported: int


@dataclass(frozen=True)
class _Blocks:
    """The repeated part of a model.

    Attributes:
        path: Module path of the list of layers.
        said: What the configuration says layer by layer.
        kinds: A fingerprint of every layer.
    """

    path: str
    said: tuple[str, ...]
    kinds: tuple[str, ...]


def is_weightless(model: str | Path) -> bool:
    """Whether something is a configuration without weights: a ``.json`` file, or a folder with nothing else."""
    path = Path(model)
    if path.is_file():
        return path.suffix == ".json"
    written = holds_conversion(path) or holds_result(path)
    return (path / "config.json").is_file() and not has_weights(path) and not written


def draw(model: str | Path, attention: str = "auto") -> WeightlessModel:
    """Build, export and recognise a model from its configuration.

    Args:
        model: A ``config.json``, or a folder that holds one.
        attention: How the model is to spell its attention: auto, sdpa or eager.

    Raises:
        LoadError: The configuration cannot be read, or no model can be built of it or exported.
    """
    config = huggingface.read_config(str(model))
    whole = huggingface.empty_model(config, attention, str(model))
    parameters = sum(p.numel() for p in whole.parameters())
    blocks = _blocks(whole, config)
    if blocks is not None:
        few = 1 + max(blocks.kinds.index(kind) for kind in blocks.kinds)
        found = _of_few_layers(config, blocks, few, attention, str(model)) if few < len(blocks.kinds) else None
        if found is not None:
            return WeightlessModel(*found, parameters, len(blocks.kinds), few)
    program = _captured(whole, str(model))
    layers = 0 if blocks is None else len(blocks.kinds)
    return WeightlessModel(program, recognise(program), parameters, layers, layers)


def _of_few_layers(
    config: Any,  # noqa: ANN401 - any transformers configuration
    blocks: _Blocks,
    few: int,
    attention: str,
    source: str,
) -> tuple[AnyProgram, Recognition] | None:
    """Recognise the model's first layers, and repeat what was found; None where that is not sure to be the same."""
    small = _shortened(config, blocks.said, few)
    module = huggingface.empty_model(small, attention, source)
    if _kinds(module, small, blocks.path, blocks.said) != blocks.kinds[:few]:
        return None
    program = _captured(module, source)
    found = recognise(program)
    layers: dict[int, AttentionSite | Rejection] = {site.index: site for site in found.sites}
    layers |= {rejection.index: rejection for rejection in found.rejections}
    places = [f"{blocks.path}.{index}." in f"{layer.path}." for index, layer in sorted(layers.items())]
    if sorted(layers) != [*range(few)] or not all(places):  # not one attention in every layer
        return None
    repeated = [
        _moved(layers[blocks.kinds.index(kind)], f"{blocks.path}.{blocks.kinds.index(kind)}", index, blocks.path)
        for index, kind in enumerate(blocks.kinds)
    ]
    return program, Recognition(
        tuple(r for r in repeated if isinstance(r, AttentionSite)),
        tuple(r for r in repeated if isinstance(r, Rejection)),
    )


def _moved(layer: AttentionSite | Rejection, old: str, index: int, path: str) -> AttentionSite | Rejection:
    """The same layer at another place of the model."""

    def named(name: str) -> str:
        return f"{name}.".replace(f"{old}.", f"{path}.{index}.", 1)[:-1]

    def read(projection: Projection) -> Projection:
        bias = None if projection.bias is None else named(projection.bias)
        return dataclasses.replace(projection, weight=named(projection.weight), bias=bias)

    if isinstance(layer, Rejection):
        return dataclasses.replace(layer, index=index, path=named(layer.path))
    sinks = layer.scores.sinks_name
    return dataclasses.replace(
        layer,
        index=index,
        path=named(layer.path),
        query=read(layer.query),
        key=read(layer.key),
        value=read(layer.value),
        scores=dataclasses.replace(layer.scores, sinks_name=None if sinks is None else named(sinks)),
    )


def _shortened(config: Any, said: Sequence[str], few: int) -> Any:  # noqa: ANN401 - any transformers configuration
    """The configuration of the model's first layers."""
    small = copy.deepcopy(config)
    own = small.get_text_config()
    for name in said:
        setattr(own, name, getattr(own, name)[:few])
    own.num_hidden_layers = few
    return small


def _captured(module: nn.Module, source: str) -> AnyProgram:
    """Export a model whose parameters have no numbers."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}  # a parameter of two names stays one
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                if id(value) not in made:
                    with mode:
                        empty = torch.empty(value.shape, dtype=value.dtype)
                    made[id(value)] = nn.Parameter(empty, requires_grad=False)
                part._parameters[name] = made[id(value)]
    return capture_any(module, None, source=source)


def _blocks(module: nn.Module, config: Any) -> _Blocks | None:  # noqa: ANN401 - any transformers configuration
    """The one list of as many modules as there are layers, if there is one."""
    own = config.get_text_config()
    layers = getattr(own, "num_hidden_layers", None)
    lists = [n for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if len(lists) != 1 or not layers:
        return None
    said = tuple(sorted(n for n, v in vars(own).items() if isinstance(v, list | tuple) and len(v) == layers))
    return _Blocks(lists[0], said, _kinds(module, config, lists[0], said))


def _kinds(module: nn.Module, config: Any, path: str, said: Sequence[str]) -> tuple[str, ...]:  # noqa: ANN401
    """Fingerprint of every layer in a list of modules."""
    own = config.get_text_config()
    blocks: Any = module.get_submodule(path)
    return tuple(_kind(block, [getattr(own, name)[i] for name in said]) for i, block in enumerate(blocks))


def _kind(block: nn.Module, said: Sequence[object]) -> str:
    """Fingerprint of a layer: all that its code can see, but for the numbers in its weights and its own place."""
    lines = [repr(said)]
    for path, part in block.named_modules():
        own = {
            k: v
            for k, v in sorted(vars(part).items())
            if not k.startswith("_") and k not in _PLACES and isinstance(v, bool | int | float | str | None)
        }
        weights = {k: (tuple(v.shape), v.dtype) for k, v in part.named_parameters(recurse=False)}
        tables = {k: _contents(v) for k, v in part.named_buffers(recurse=False)}
        lines.append(f"{path} {type(part).__module__}.{type(part).__qualname__} {own} {weights} {tables}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _contents(value: Tensor) -> str:
    stored = b"" if value.is_meta else value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(stored).hexdigest()}"
