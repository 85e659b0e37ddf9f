"""What is particular to transformers models: which class reads a checkpoint, and which inputs it is exported with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mla_compile.errors import LoadError, reason_of
from mla_compile.hub import hub_answers
from mla_compile.program import Assets
from mla_compile.sources.checkpoint_files import require_files, require_fitting_weights

__all__ = [
    "assets_of",
    "empty_model",
    "is_transformers_model",
    "plain_inputs",
    "read_checkpoint",
    "read_config",
    "without_cache",
]

_BATCH, _LENGTH, _TARGET = 2, 5, 7
"""Sizes of the inputs a model is exported with; a decoder's length differs from its encoder's, as it may."""


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a transformers model, whose inputs are known."""
    return hasattr(module, "config") and hasattr(module, "main_input_name")


def read_checkpoint(name: str, attention: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a checkpoint as what it says it is: a causal language model if it can be one.

    Args:
        name: Folder or hub id.
        attention: ``sdpa``, ``eager``, or ``auto`` for the first of the two that the model has.
        dtype: Type to load its weights in; by default what the checkpoint is in.

    Raises:
        LoadError: It cannot be loaded, or lacks weights.
    """
    from transformers.utils import logging as transformers_logging

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise LoadError(f"The folder '{name}' has no config.json.", "Give a Hugging Face model folder.")
    if Path(name).is_dir():
        require_files(Path(name))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    failures: list[LoadError] = []
    config = read_config(name)
    for kind in _classes(config):
        try:
            return _read(kind, name, config, attention, dtype)
        except LoadError as error:
            failures.append(error)
    raise failures[0]


def read_config(name: str) -> Any:  # noqa: ANN401 - any transformers configuration
    """Read a model's configuration.

    Args:
        name: A ``config.json``, a folder, or a hub id.

    Raises:
        LoadError: It cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=not (Path(name).exists() or hub_answers(name)))
    except Exception as error:
        if isinstance(error, OSError) and not Path(name).exists():
            raise LoadError(
                f"There is no file or folder '{name}', and none of that name came from the hub ({reason_of(error)}).",
                "Check the path or id, and that the hub can be reached.",
            ) from error
        raise _unreadable(name, error) from error


def empty_model(config: Any, attention: str, name: str) -> nn.Module:  # noqa: ANN401 - transformers configuration
    """Build the model of a configuration with parameters on the device ``meta``, and real buffers.

    Args:
        config: The configuration.
        attention: As for :func:`read_checkpoint`.
        name: What to call it.

    Raises:
        LoadError: There is no class for it, or it cannot be built.
    """
    kind = _classes(config)[0]
    build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    settings = {"dtype": getattr(config, "dtype", None) or torch.float32}
    try:
        with _parameters_without_numbers():
            try:
                model: nn.Module = build(
                    config, attn_implementation="sdpa" if attention == "auto" else attention, **settings
                )
            except ValueError as error:
                if attention != "auto" or "scaled_dot_product_attention" not in str(error):
                    raise
                model = build(config, attn_implementation="eager", **settings)
    except Exception as error:
        raise _unreadable(name, error) from error
    model.tie_weights()  # type: ignore[operator]  # putting parameters on another device parts what is one
    return model.eval()


@contextmanager
def _parameters_without_numbers() -> Iterator[None]:
    """Move every parameter to the device ``meta`` as soon as a module gets it, before anything is written to it."""
    register = nn.Module.register_parameter

    def emptied(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.detach().to("meta"), param.requires_grad))

    nn.Module.register_parameter = emptied  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _classes(config: Any) -> list[Any]:  # noqa: ANN401 - any transformers configuration
    """Classes to try, in order."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = getattr(config, "model_type", "")
    said = getattr(config, "architectures", None)
    name = said[0] if isinstance(said, list) and said and isinstance(said[0], str) else ""
    named = getattr(transformers, name, None)
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        named = None
    others = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    )
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    usual = transformers.AutoModelForCausalLM
    if named is None or name == causal:
        return [usual]
    if any(table.get(kind) for table in others):  # a family of encoders: its causal class would read half of it
        return [named, usual]
    return [usual] if causal else [usual, named]


def _read(kind: Any, name: str, config: Any, attention: str, dtype: torch.dtype | None) -> nn.Module:  # noqa: ANN401 - transformers classes
    read: Callable[..., Any] = functools.partial(
        kind.from_pretrained,
        name,
        config=config,
        dtype=dtype or "auto",  # as they are, weights stay where they are: mapped from their files
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
    )
    try:
        try:
            model, info = read(attn_implementation="sdpa" if attention == "auto" else attention)
        except ValueError as error:
            if attention != "auto" or "scaled_dot_product_attention" not in str(error):
                raise
            model, info = read(attn_implementation="eager")
    except Exception as error:
        raise _unreadable(name, error) from error
    require_fitting_weights(name, info, model.state_dict())
    loaded: nn.Module = model
    return loaded


def _unreadable(name: str, error: Exception) -> LoadError:
    if Path(name).exists():
        return LoadError(
            f"'{name}' could not be loaded by transformers ({reason_of(error)}).",
            "Check that its files are whole, what config.json says, and that the weights are safetensors.",
        )
    return LoadError(
        f"'{name}' could not be loaded from Hugging Face ({reason_of(error)}).",
        "Check the path or id, that the weights are safetensors, and that the hub can be reached.",
    )


def plain_inputs(module: nn.Module) -> dict[str, Tensor]:
    """Inputs that make transformers build the plainest graph: padding mask and positions given, nothing to detect.

    Args:
        module: A transformers model of any kind.
    """
    config: Any = module.config
    ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
    targets = torch.zeros(_BATCH, _TARGET, dtype=torch.long)
    offered = {
        "input_ids": ids,
        "pixel_values": None if _is_language_model(module) else _image(config),
        "input_features": _spectrum(config),
        "attention_mask": torch.ones_like(ids) if str(module.main_input_name) == "input_ids" else None,
        "position_ids": torch.arange(_LENGTH).expand(_BATCH, _LENGTH).contiguous(),
        "token_type_ids": torch.zeros_like(ids) if _has_segments(module) else None,
        "decoder_input_ids": targets,
        "decoder_attention_mask": torch.ones_like(targets),
    }
    accepted = inspect.signature(module.forward).parameters
    return {name: value for name, value in offered.items() if name in accepted and value is not None}


def _is_language_model(module: nn.Module) -> bool:
    """Whether a model is its type's causal language model, which needs nothing but tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config: Any = module.config
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return any(kind.__name__ == causal for kind in type(module).__mro__)


def _has_segments(module: nn.Module) -> bool:
    """Whether a model tells segments of its text apart, as encoders in the manner of BERT do."""
    return hasattr(module.config, "type_vocab_size") and not _is_language_model(module)


def _image(config: Any) -> Tensor | None:  # noqa: ANN401 - any transformers configuration
    part = getattr(config, "encoder", config)  # what reads images, in a composed model
    size, channels = getattr(part, "image_size", None), getattr(part, "num_channels", None)
    if size is None or channels is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(_BATCH, int(channels), int(height), int(width))


def _spectrum(config: Any) -> Tensor | None:  # noqa: ANN401 - any transformers configuration
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    # Whisper's second convolution halves the number of frames.
    return None if bins is None or frames is None else torch.zeros(_BATCH, int(bins), 2 * int(frames))


@contextmanager
def without_cache(module: nn.Module) -> Iterator[None]:
    """Keep a model, and an encoder-decoder's parts, from making a cache."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if getattr(config, "use_cache", None) is not None:
            configs[id(config)] = config
    before: Mapping[int, Any] = {key: config.use_cache for key, config in configs.items()}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]


def assets_of(module: nn.Module, tokenizer: str | None) -> Assets:
    """Configuration, generation settings and tokenizer of a transformers model."""
    config: Any = getattr(module, "config", None)
    generation: Any = getattr(module, "generation_config", None)
    name = getattr(module, "name_or_path", None)
    if tokenizer is None and name and (Path(str(name)) / "tokenizer_config.json").is_file():
        tokenizer = str(name)
    return Assets(
        folder=tokenizer,
        # Where the original lay is nobody's business but the report's.
        config={k: v for k, v in config.to_dict().items() if k != "_name_or_path"} if config is not None else {},
        generation=generation.to_diff_dict() if generation is not None else {},
    )
