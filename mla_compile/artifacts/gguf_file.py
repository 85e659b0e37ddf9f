"""A DeepSeek-V3 checkpoint as one file for llama.cpp, written by llama.cpp's own package ``gguf``.

llama.cpp calls the architecture ``deepseek2``. Its attention is multi-query attention to the latents themselves, so
that the up-projection is stored as one matrix per head for keys and one for values. Where rotations are scaled it has
factors of its own for logits and rotations, which queries and rope keys make up for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mla_compile.artifacts.checkpoint_folder import DEFAULT_SHARD, read_expected, write_checkpoint
from mla_compile.artifacts.companions import CHECKPOINT, finished, stored_report
from mla_compile.artifacts.gguf_check import GREEDY, IDS, LOGITS, TOLERANCE, has_llama_cpp, verify_gguf
from mla_compile.artifacts.gguf_tensors import DeepSeekFolder, write_tensors
from mla_compile.artifacts.gguf_vocabulary import read_vocabulary
from mla_compile.artifacts.places import check_neighbours, check_place
from mla_compile.disk.writing import moved_into
from mla_compile.errors import RefusedError, UsageError
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import Report
from mla_compile.runtime.module import LatentModel

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["UNCHECKED", "check_gguf", "cost_of_biases", "export_gguf", "write_and_check", "write_gguf"]

_ARCHITECTURE = "deepseek2"
_LITE_LAYERS = (26, 27)
_LITE_VOCABULARY = (48, 128256)
"""Models that llama.cpp takes for DeepSeek-V2-Lite, by layers or by layers and tokens; it has no query latent."""
_LAYERS, _EXPERTS = 512, 0
_SCALINGS = ("default", "linear", "yarn")
"""Of rotations, that its file format says in numbers."""
_REMEDY = "Write --format deepseek instead."
UNCHECKED = "the file was not checked in llama.cpp: llama-cpp-python is not installed"


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
            checkpoint = Path(scratch) / "checkpoint"
            written = write_checkpoint(
                module, report, assets, checkpoint, checks, shard=DEFAULT_SHARD, force=True, stages=stages
            )
            assert written.checkpoint is not None
            error = write_and_check(checkpoint, folder / path.name, Path(report.source).name, stages)
        facts = dataclasses.replace(written.checkpoint, llama_cpp_error=error, caveats=())
        notes = () if error is not None else (UNCHECKED,)
        report = dataclasses.replace(report, checkpoint=facts, warnings=(*report.warnings, *notes))
        return finished(report, folder, stages)


def write_and_check(checkpoint: Path, file: Path, name: str, stages: Stages) -> float | None:
    """Write a checkpoint as a file, and compare it in llama.cpp with the answers that the checkpoint holds.

    Args:
        checkpoint: A folder written with ``--format deepseek``.
        file: The file.
        name: What the model is called in it.
        stages: Times and shows what runs.

    Returns:
        The relative error of logits in llama.cpp; None where it is not installed, or the folder holds no answers.

    Raises:
        LoadError, RefusedError, VerificationError: As :func:`export_gguf`.
    """
    with stages.stage("write GGUF"):
        answers = _write(checkpoint, file, name)
    if not answers or not has_llama_cpp():
        return None
    with stages.stage("verify GGUF"):
        return verify_gguf(file)[0]


def export_gguf(source: Path, path: Path, *, force: bool, stages: Stages) -> float | None:
    """Write a DeepSeek checkpoint as a file for llama.cpp, which is there only when the check passed.

    Args:
        source: A folder written with ``--format deepseek``.
        path: The ``.gguf`` file.
        force: Replace an existing file.
        stages: Times and shows what runs.

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
        return write_and_check(source, folder / path.name, source.absolute().name, stages)


def _write(source: Path, file: Path, name: str) -> bool:
    """Write a checkpoint as a file, and say whether it holds answers to compare with."""
    import gguf

    stored = DeepSeekFolder.read(source)
    _require_expressible(stored)
    stored.require_whole()
    vocabulary = read_vocabulary(source, int(stored.config["vocab_size"]))
    expected = read_expected(source)
    writer = gguf.GGUFWriter(file, _ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    _add_sizes(writer, stored.config)
    _add_rotation(writer, stored.config)
    vocabulary.write(writer)
    if expected is not None:
        writer.add_array(IDS, expected.ids.tolist())
        writer.add_uint32(GREEDY, expected.greedy)
        writer.add_array(LOGITS, expected.logits[-1].tolist())
        writer.add_float32(TOLERANCE, expected.tolerance)
    write_tensors(writer, stored)
    return expected is not None


def _require_expressible(stored: DeepSeekFolder) -> None:
    """Refuse what llama.cpp's graph of this architecture has no place for, each by its own check there."""
    config = stored.config
    layers, vocabulary = int(config["num_hidden_layers"]), int(config["vocab_size"])
    lite = layers in _LITE_LAYERS or (layers, vocabulary) == _LITE_VOCABULARY
    scaling = config["rope_parameters"]["rope_type"]
    obstacles = {
        "attention has biases, and its loader takes no tensors for them ('wrong number of tensors')"
        f"{cost_of_biases(stored.folder)}": config.get("attention_bias"),
        f"rotations are scaled by '{scaling}', and its rope takes no table of factors": scaling not in _SCALINGS,
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
    if config["first_k_dense_replace"] < layers:
        raise RefusedError(
            f"'{stored.folder}' has layers with experts, which mla-compile does not write for llama.cpp.",
            "Convert it with llama.cpp's own convert_hf_to_gguf.py.",
        )


def cost_of_biases(folder: Path) -> str:
    """What leaving them out would cost, where it was measured."""
    try:
        cost = json.loads(stored_report(folder / CHECKPOINT).read_text(encoding="utf-8"))["checkpoint"][
            "without_biases"
        ]
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
