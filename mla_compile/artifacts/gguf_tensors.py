"""Tensors of a DeepSeek checkpoint as llama.cpp names and arranges them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mla_compile.artifacts.checkpoint import stock_rotation
from mla_compile.errors import LoadError, first_line, reason_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["DeepSeekFolder", "write_tensors"]

_ANOTHER = "Give a folder written by mla-compile with --format deepseek."
_AGAIN = "Copy the folder again, or convert the model again."
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of tensors whose numbers are the weights themselves, as safetensors names them."""


@dataclass(frozen=True)
class DeepSeekFolder:
    """A DeepSeek checkpoint in a folder.

    Attributes:
        folder: The folder.
        config: Its ``config.json``, with what stock transformers takes for what it does not say.
        files: The file of every tensor.
    """

    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> DeepSeekFolder:
        """Read what is in a folder; tensors are read when they are asked for.

        Raises:
            LoadError: It is no such checkpoint.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = config.get("architectures")
            index = folder / "model.safetensors.index.json"
            if index.is_file():
                files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            else:
                with safe_open(folder / "model.safetensors", "pt") as opened:
                    files = dict.fromkeys(opened.keys(), "model.safetensors")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise LoadError(f"'{folder}' holds no DeepSeek checkpoint ({first_line(error)}).", _ANOTHER) from error
        if kind != ["DeepseekV3ForCausalLM"]:
            raise LoadError(f"'{folder}' holds no DeepSeek checkpoint, but {kind}.", _ANOTHER)
        return cls(folder, _complete(config, folder), dict(sorted(files.items())))

    def require_whole(self) -> None:
        """Refuse a checkpoint whose tensors are not those that its configuration asks for, in names and shapes.

        Raises:
            LoadError: With the first that is missing, foreign or of another shape, or a file that cannot be read.
        """
        asked = _asked_for(self.config, self.folder)
        try:
            found = {name: (shape, kind) for name, shape, kind in self.shapes()}
        except (OSError, TypeError, SafetensorError) as error:
            raise LoadError(f"Weights of '{self.folder}' cannot be read ({first_line(error)}).", _AGAIN) from error
        missing, foreign = sorted(asked.keys() - found.keys()), sorted(found.keys() - asked.keys())
        if missing:
            raise LoadError(f"'{self.folder}' lacks the weight '{missing[0]}', which its config.json asks for.", _AGAIN)
        if foreign:
            raise LoadError(
                f"'{self.folder}' has a weight '{foreign[0]}', which its config.json has no place for.", _AGAIN
            )
        for name, (shape, kind) in found.items():
            if shape != asked[name]:
                raise LoadError(
                    f"'{name}' of '{self.folder}' has the shape {shape}, and its config.json asks for {asked[name]}.",
                    _AGAIN,
                )
            if kind not in _FLOATS:
                raise LoadError(f"'{name}' of '{self.folder}' is of the type {kind}, which is no float.", _ANOTHER)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name; one is in memory at a time."""
        for name, file in self.files.items():
            with safe_open(self.folder / file, "pt") as opened:
                yield name, opened.get_tensor(name)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and type of every tensor, without reading it."""
        for name, file in self.files.items():
            with safe_open(self.folder / file, "pt") as opened:
                part = opened.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()


def _complete(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration as stock transformers reads it: with defaults, and rotations where they are today."""
    from transformers import DeepseekV3Config

    try:
        found: dict[str, Any] = DeepseekV3Config.from_dict(dict(config)).to_dict()
    except Exception as error:  # its own checks, of any class
        raise _unusable(folder, error) from error
    return found


def _asked_for(config: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that stock transformers makes of a configuration."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    try:
        stock_rotation(config)
        with torch.device("meta"):
            model = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(dict(config)))
    except Exception as error:  # of sizes that fit nothing, any class
        raise _unusable(folder, error) from error
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _unusable(folder: Path, error: Exception) -> LoadError:
    return LoadError(f"'{folder / 'config.json'}' describes no DeepSeek model ({reason_of(error)}).", _AGAIN)


@dataclass(frozen=True)
class _Correction:
    """What transformers computes with, over what llama.cpp does.

    Attributes:
        logits: Factor of logits.
        rotation: Factor of rotations.
    """

    logits: float
    rotation: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Correction:
        """Of a checkpoint.

        ``build_arch_graph`` of ``deepseek2`` makes up for a factor of YaRN that it takes for given: with a factor ``s``
        and ``m = 1 + 0.1 ln s`` logits are multiplied by ``m^2`` wherever rotations are scaled, and rotations by ``m``
        where that is by YaRN.
        """
        kind = config["rope_parameters"]["rope_type"]
        if kind == "default":
            return cls(1.0, 1.0)
        theirs = 1 + 0.1 * math.log(config["rope_parameters"]["factor"])
        _, factor, scale = stock_rotation(config)
        width = int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])
        return cls(scale * math.sqrt(width) / theirs**2, factor / (theirs if kind == "yarn" else 1.0))


def write_tensors(writer: GGUFWriter, stored: DeepSeekFolder) -> None:
    """Write every tensor, one in memory at a time."""
    import gguf

    layers = int(stored.config["num_hidden_layers"])
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, layers)
    correction = _Correction.of(stored.config)
    half = False
    for name, shape, kind in stored.shapes():
        for part, size in _parts(name, shape, stored.config):
            found = known.get_name(part, try_suffixes=(".weight",))
            assert found is not None, part
            narrow = kind == "BF16" and len(size) > 1  # its norms are float32
            half = half or narrow
            raw = gguf.GGMLQuantizationType.BF16 if narrow else None
            bytes_each = 2 if narrow else 4
            dtype = np.dtype(np.int16 if narrow else np.float32)
            writer.add_tensor_info(found, size, dtype, math.prod(size) * bytes_each, raw)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if half else gguf.LlamaFileType.ALL_F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, value in stored.tensors():
        corrected = _corrected(name, value, stored.config, correction)
        for piece in _split(name, corrected, stored.config):
            writer.write_tensor_data(_numbers(piece))
    writer.close()


def _parts(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names, still of transformers' kind, and shapes of what a tensor becomes."""
    if not name.endswith("kv_b_proj.weight"):
        yield name, shape
        return
    heads, latent = int(config["num_attention_heads"]), shape[1]
    yield name.replace("kv_b_proj", "k_b_proj"), (heads, latent, int(config["qk_nope_head_dim"]))
    yield name.replace("kv_b_proj", "v_b_proj"), (heads, int(config["v_head_dim"]), latent)


def _split(name: str, value: Tensor, config: Mapping[str, Any]) -> Iterator[Tensor]:
    if not name.endswith("kv_b_proj.weight"):
        yield value
        return
    keys, values = value.unflatten(0, (int(config["num_attention_heads"]), -1)).split(
        [int(config["qk_nope_head_dim"]), int(config["v_head_dim"])], 1
    )
    yield keys.mT
    yield values


def _corrected(name: str, value: Tensor, config: Mapping[str, Any], correction: _Correction) -> Tensor:
    if correction == _Correction(1.0, 1.0):
        return value
    rope = int(config["qk_rope_head_dim"])
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        heads = value.double().unflatten(0, (int(config["num_attention_heads"]), -1)) * correction.logits
        heads[:, -rope:] *= correction.rotation
        return torch.flatten(heads, 0, 1).to(value.dtype)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        rows = value.double()
        rows[-rope:] *= correction.rotation
        return rows.to(value.dtype)
    return value


def _numbers(value: Tensor) -> NDArray[Any]:
    narrow = value.dtype == torch.bfloat16 and value.dim() > 1
    found: NDArray[Any] = (value.contiguous().view(torch.int16) if narrow else value.contiguous().float()).numpy()
    return found
