"""``genai_config.json``: what onnxruntime-genai needs to know of an ONNX file whose caches are two halves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from mla_compile.artifacts.companions import GENAI_CONFIG, read_assets
from mla_compile.artifacts.places import check_neighbours
from mla_compile.errors import LoadError, UsageError, first_line
from mla_compile.program import Assets
from mla_compile.runtime.onnx_cache import KEY_VALUE
from mla_compile.runtime.onnx_halves import half_width

__all__ = ["assets_beside", "genai_config_of", "with_file", "write_config", "write_genai_config"]

_CONTEXT = 2048
"""Longest sequence of a model that does not say."""


def write_genai_config(file: Path, rows: Sequence[int], assets: Assets, *, static: bool) -> None:
    """Write the configuration beside an ONNX file.

    Args:
        file: The ONNX file; its own input names are read from it.
        rows: Cache row length per layer.
        assets: Configuration of the original, for token ids and the longest sequence.
        static: Whether its caches are static, which is what a buffer shared by past and present is.
    """
    graph = onnx.load(file, load_external_data=False).graph
    inputs, (logits, *_) = {value.name for value in graph.input}, graph.output
    heads = assets.config.get("num_attention_heads") or 1
    longest = assets.longest or _CONTEXT
    given = {**assets.config, **{k: v for k, v in assets.generation.items() if v is not None}}
    eos = given.get("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    names = [name.replace("{}", "%d") for pair in KEY_VALUE for name in pair]
    taken = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    config: dict[str, Any] = {
        "model": {
            "type": "decoder",
            "bos_token_id": _known(given.get("bos_token_id")),
            "eos_token_id": _known(eos),
            "pad_token_id": _known(given.get("pad_token_id"), first_eos),
            "context_length": longest,
            "vocab_size": logits.type.tensor_type.shape.dim[-1].dim_value,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file.name,
                "head_size": half_width(rows),
                "hidden_size": assets.config.get("hidden_size") or heads * half_width(rows),
                "num_attention_heads": heads,
                "num_key_value_heads": 1,
                "num_hidden_layers": len(rows),
                "inputs": {**taken, "past_key_names": names[0], "past_value_names": names[2]},
                "outputs": {"logits": "logits", "present_key_names": names[1], "present_value_names": names[3]},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": longest,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": static,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
    write_config(config, file.parent)


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write a configuration into a folder."""
    (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def genai_config_of(file: Path) -> Mapping[str, Any] | None:
    """What is told of an ONNX file in the ``genai_config.json`` beside it; None: there is none, or it is of another.

    Args:
        file: The ONNX file.

    Raises:
        LoadError: The configuration is damaged.
    """
    path = file.with_name(GENAI_CONFIG)
    if not path.is_file():
        return None
    try:
        config: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        return config if config["model"]["decoder"]["filename"] == file.name else None
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"'{path}' is damaged ({first_line(error)}).", "Convert the model again.") from error


def assets_beside(model: Path, out: Path, force: bool, *, told: bool) -> Assets:
    """Configuration and tokenizer that a file which is made of another lacks: in another folder, those of the other.

    Args:
        model: The file it is made of.
        out: Where it goes.
        force: Replace existing files.
        told: Whether onnxruntime-genai is told of it.

    Raises:
        LoadError: What lies beside the given file is damaged.
        UsageError: Something of another model lies there, or what onnxruntime-genai is told of the given file.
    """
    if out.absolute().parent != model.absolute().parent:
        assets = read_assets(model.parent)
        check_neighbours(out, str(model), assets, force, "genai" if told else "rows")
        return assets
    if told and not force:
        raise UsageError(
            f"'{out.with_name(GENAI_CONFIG)}' names '{model.name}', and onnxruntime-genai knows one file per folder.",
            f"Pass --force to have it name '{out.name}', or write to another folder.",
        )
    return Assets()


def with_file(config: Mapping[str, Any], file: Path, library: Path | None = None) -> Mapping[str, Any]:
    """The configuration for another file.

    Args:
        config: What is told of a file.
        file: One with the same inputs and outputs.
        library: Operators that it needs, in the same folder: onnxruntime-genai loads no other.
    """
    decoder = config["model"]["decoder"]
    options = dict(decoder.get("session_options", {}))
    if library is not None:
        options["custom_ops_library"] = library.name
    told = {**decoder, "filename": file.name, "session_options": options}
    return {**config, "model": {**config["model"], "decoder": told}}


def _known(token: Any, other: Any = None) -> Any:  # noqa: ANN401 - token ids, or a list of them
    """A token id that genai can read: where there is none, one that ends nothing."""
    if token is None or token == []:
        return 0 if other is None else other
    return token
