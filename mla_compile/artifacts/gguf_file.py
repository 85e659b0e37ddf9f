"""A DeepSeek-V3 checkpoint as one file for llama.cpp, written by llama.cpp's own package ``gguf``.

llama.cpp calls the architecture ``deepseek2``. Its attention is multi-query attention to the latents themselves, so
that the up-projection is stored as one matrix per head for keys and one for values. Where rotations are scaled it has
factors of its own for logits and rotations, which queries and rope keys make up for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from mla_compile.artifacts.checkpoint import stock_rotation
from mla_compile.artifacts.checkpoint_folder import DEFAULT_SHARD, Expected, read_expected, write_checkpoint
from mla_compile.artifacts.companions import finished
from mla_compile.artifacts.gguf_vocabulary import read_vocabulary
from mla_compile.artifacts.places import check_neighbours, check_place
from mla_compile.disk.writing import moved_into
from mla_compile.errors import LoadError, RefusedError, UsageError, VerificationError
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import Report
from mla_compile.runtime.module import LatentModel
from mla_compile.text.evaluate import relative_error

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["check_gguf", "export_gguf", "has_llama_cpp", "verify_gguf", "write_gguf"]

_ARCHITECTURE = "deepseek2"
_LITE_LAYERS = (26, 27)
_LITE_VOCABULARY = (48, 128256)
"""Models that llama.cpp takes for DeepSeek-V2-Lite, by layers or by layers and tokens; it has no query latent."""
_LAYERS, _EXPERTS = 512, 0
_REMEDY = "Write --format deepseek instead."
_UNCHECKED = "the file was not checked in llama.cpp: llama-cpp-python is not installed"
_IDS, _GREEDY, _LOGITS, _TOLERANCE = (f"mla_compile.check.{name}" for name in ("ids", "greedy", "logits", "tolerance"))


@dataclass(frozen=True)
class _Stored:
    """A DeepSeek checkpoint in a folder.

    Attributes:
        folder: The folder.
        config: Its ``config.json``.
        files: The file of every tensor.
    """

    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> _Stored:
        """Read what is in a folder; tensors are read when they are asked for.

        Raises:
            LoadError: It is no such checkpoint.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            index = folder / "model.safetensors.index.json"
            if index.is_file():
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            else:
                with safe_open(folder / "model.safetensors", "pt") as opened:
                    files = dict.fromkeys(opened.keys(), "model.safetensors")
        except (OSError, ValueError, KeyError) as error:
            raise LoadError(
                f"'{folder}' holds no DeepSeek checkpoint ({error}).",
                "Give a folder written by mla-compile with --format deepseek.",
            ) from error
        if config.get("architectures") != ["DeepseekV3ForCausalLM"]:
            raise LoadError(
                f"'{folder}' holds no DeepSeek checkpoint, but {config.get('architectures')}.",
                "Give a folder written by mla-compile with --format deepseek.",
            )
        return cls(folder, config, dict(sorted(files.items())))

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


def check_gguf(path: Path, force: bool) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        UsageError: The name has another suffix, exists already, or llama.cpp's package is not installed.
    """
    if path.suffix != ".gguf" or path.name == ".gguf" or path.is_dir():
        raise UsageError(f"'{path}' is not named like a GGUF file.", "Name a file with the suffix .gguf.")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "llama.cpp's package gguf, which writes its files, is not installed.",
            "Run: pip install 'mla-compile[gguf]'.",
        )
    check_place(path, force)


def has_llama_cpp() -> bool:
    """Whether llama.cpp is installed for Python, so that a file can be checked in it."""
    return importlib.util.find_spec("llama_cpp") is not None


def write_gguf(
    module: LatentModel,
    report: Report,
    assets: Assets,
    path: Path,
    checks: Tensor | None,
    *,
    force: bool,
    stages: Stages,
) -> Report:
    """Write a converted model as a file for llama.cpp; it is there only when the checks passed.

    It is made of a DeepSeek checkpoint, which is checked in transformers and then removed, and is checked itself where
    llama-cpp-python is installed.

    Args:
        module: The converted model.
        report: What was done so far.
        assets: Configuration and tokenizer of the original.
        path: The ``.gguf`` file.
        checks: Token ids ``[batch, length]`` to compare on; random ones when None.
        force: Replace an existing file.
        stages: Times and shows what runs.

    Returns:
        The completed report, also written as ``report.json`` beside the file.

    Raises:
        UsageError: The file cannot be written, or the model was converted with another layout.
        LoadError: The model has no configuration.
        RefusedError: Its blocks are not those of such a checkpoint, or llama.cpp would compute something else.
        VerificationError: Stock transformers or llama.cpp computes something else.
    """
    check_gguf(path, force)
    check_neighbours(path, report.source, Assets(), force)
    with moved_into(path.parent) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source = Path(scratch) / "checkpoint"
            written = write_checkpoint(
                module, report, assets, source, checks, shard=DEFAULT_SHARD, force=True, stages=stages
            )
            with stages.stage("write GGUF"):
                _write(source, folder / path.name, Path(report.source).name)
        error = None
        if has_llama_cpp():
            with stages.stage("verify GGUF"):
                error, _ = verify_gguf(folder / path.name)
        assert written.checkpoint is not None
        facts = dataclasses.replace(written.checkpoint, llama_cpp_error=error, caveats=())
        notes = () if error is not None else (_UNCHECKED,)
        report = dataclasses.replace(report, checkpoint=facts, warnings=(*report.warnings, *notes))
        return finished(report, folder, stages)


def export_gguf(source: Path, path: Path, *, force: bool) -> float | None:
    """Write a DeepSeek checkpoint as a file for llama.cpp, which is there only when the check passed.

    Args:
        source: A folder written with ``--format deepseek``.
        path: The ``.gguf`` file.
        force: Replace an existing file.

    Returns:
        The relative error of logits in llama.cpp; None where it is not installed, or the folder holds no answers.

    Raises:
        UsageError: The file cannot be written.
        LoadError: The folder holds no such checkpoint.
        RefusedError: llama.cpp would compute something else, or has no such tokenizer.
        VerificationError: llama.cpp computes something else.
    """
    check_gguf(path, force)
    with moved_into(path.parent) as folder:
        answers = _write(source, folder / path.name, source.absolute().name)
        return verify_gguf(folder / path.name)[0] if answers and has_llama_cpp() else None


def _write(source: Path, file: Path, name: str) -> bool:
    """Write a checkpoint as a file, and say whether it holds answers to compare with."""
    import gguf

    stored = _Stored.read(source)
    _require_expressible(stored)
    vocabulary = read_vocabulary(source, int(stored.config["vocab_size"]))
    expected = read_expected(source)
    writer = gguf.GGUFWriter(file, _ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    _add_sizes(writer, stored.config)
    _add_rotation(writer, stored.config)
    vocabulary.write(writer)
    if expected is not None:
        writer.add_array(_IDS, expected.ids.tolist())
        writer.add_uint32(_GREEDY, expected.greedy)
        writer.add_array(_LOGITS, expected.logits[-1].tolist())
        writer.add_float32(_TOLERANCE, expected.tolerance)
    _write_tensors(writer, stored)
    return expected is not None


def _require_expressible(stored: _Stored) -> None:
    """Refuse what llama.cpp's graph of this architecture has no place for, each by its own check there."""
    config = stored.config
    layers, vocabulary = int(config["num_hidden_layers"]), int(config["vocab_size"])
    lite = layers in _LITE_LAYERS or (layers, vocabulary) == _LITE_VOCABULARY
    scaling = config["rope_parameters"]["rope_type"]
    obstacles = {
        "attention has biases, and its loader takes no tensors for them ('wrong number of tensors')"
        f"{_cost_of_biases(stored.folder)}": config.get("attention_bias"),
        f"rotations are scaled by '{scaling}', and its rope takes no table of factors": scaling == "llama3",
        "'truncate' of YaRN is false, and its ramp begins and ends at whole channels": (
            config["rope_parameters"].get("truncate", True) is False
        ),
        f"the activation is '{config['hidden_act']}', and its MLP has silu": config["hidden_act"] != "silu",
        f"with {layers} layers it takes a model for DeepSeek-V2-Lite, which has no query latent": (
            lite and config.get("q_lora_rank") is not None
        ),
        "no channel of a key is without rotation ('n_embd_head_qk_nope >= 1')": config["qk_nope_head_dim"] < 1,
        f"it has at most {_LAYERS} layers": layers > _LAYERS,
    }
    for reason, present in obstacles.items():
        if present:
            raise RefusedError(f"llama.cpp cannot compute this checkpoint: {reason}.", _REMEDY)


def _cost_of_biases(folder: Path) -> str:
    """What leaving them out would cost, where it was measured."""
    try:
        cost = json.loads((folder / "report.json").read_text(encoding="utf-8"))["checkpoint"]["without_biases"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"; leaving them out would cost {cost:.2g} nats per token" if cost else ""


def _add_sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    latent, rope = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # latents are what all heads attend to
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["num_hidden_layers"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])  # read, and of no layer
    writer.add_expert_shared_count(_EXPERTS)
    writer.add_q_lora_rank(config.get("q_lora_rank") or 0)  # wanted, and 0 where queries have no latent
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)


def _add_rotation(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    import gguf

    rotation = config["rope_parameters"]
    writer.add_rope_freq_base(rotation["rope_theta"])
    if rotation["rope_type"] == "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rotation["rope_type"]))
    writer.add_rope_scaling_factor(rotation["factor"])
    if rotation["rope_type"] == "yarn":
        original = rotation.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(float(rotation.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rotation.get("beta_slow") or 1))


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


def _write_tensors(writer: GGUFWriter, stored: _Stored) -> None:
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


def verify_gguf(path: Path) -> tuple[float, float]:
    """Load a file in llama.cpp, and compare it with what the converted module answered.

    Args:
        path: A file written by :func:`write_gguf`.

    Returns:
        The relative error of the last token's logits, and the share of greedy tokens that are equal.

    Raises:
        LoadError: The file holds no answers, or llama.cpp does not load it, or is not installed.
        VerificationError: It answers something else.
    """
    if not has_llama_cpp():
        raise LoadError(
            "llama.cpp for Python, which a GGUF file is checked in, is not installed.",
            "Run: pip install llama-cpp-python (it is built from source).",
        )
    expected = _kept(path)
    ids, count = expected.ids.tolist(), expected.greedy
    logits = _llama_cpp_logits(path, ids, len(ids) - count)
    error = relative_error(torch.from_numpy(logits[-1]), expected.logits[-1])
    if not error <= expected.tolerance:
        raise VerificationError(
            f"The file in llama.cpp differs from the converted PyTorch module by {error:.1e} of the largest logit "
            f"(allowed: {expected.tolerance:.0e}).",
            "Write --format deepseek instead; an export has left nothing behind.",
        )
    return error, float((logits[:-1].argmax(-1) == np.array(ids[-count:])).mean())


def _kept(path: Path) -> Expected:
    """The answers that a file holds."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        ids, greedy, logits, tolerance = (fields[name].contents() for name in (_IDS, _GREEDY, _LOGITS, _TOLERANCE))
        return Expected(torch.tensor(ids), int(greedy), torch.tensor(logits)[None], float(tolerance))
    except Exception as error:  # the reader trusts every size that a file says
        raise LoadError(
            f"'{path}' holds no answers to compare with.", "Give a GGUF file written by mla-compile."
        ) from error


def _llama_cpp_logits(path: Path, ids: list[int], prompt: int) -> NDArray[np.float32]:
    """Logits of the last prompt token and of every one behind it, which come one at a time, with a float32 cache."""
    import llama_cpp

    try:
        model = llama_cpp.Llama(
            str(path),
            n_ctx=len(ids),
            n_batch=max(prompt, 1),
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            logits_all=True,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise LoadError(f"llama.cpp does not load '{path}' ({error}).", "Convert the model again.") from error
    model.eval(ids[:prompt])
    for token in ids[prompt:]:
        model.eval([token])
    found: NDArray[np.float32] = model.scores[prompt - 1 : len(ids)].copy()
    model.close()
    return found
