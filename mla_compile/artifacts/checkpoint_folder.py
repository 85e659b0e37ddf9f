"""Write a stock checkpoint as a Hugging Face folder, and check that stock transformers answers as the module does.

What the converted module answered is kept in the folder, so that the folder can be checked where it is taken to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mla_compile.artifacts.blueprint import Blueprint, read_blueprint
from mla_compile.artifacts.checkpoint import Checkpoint, stock_checkpoint
from mla_compile.artifacts.companions import copy_assets, finished, write_settings
from mla_compile.artifacts.places import check_neighbours, check_place
from mla_compile.config import REPORT, SETTINGS
from mla_compile.disk.writing import moved_into
from mla_compile.errors import LoadError, UsageError, VerificationError, reason_of
from mla_compile.passes.retype import type_name
from mla_compile.program import Assets
from mla_compile.progress import Stages
from mla_compile.report import CheckpointFacts, Report, text_kind
from mla_compile.runtime.generate import generate
from mla_compile.runtime.module import LatentModel, cache_dtype
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.sources import huggingface
from mla_compile.text.evaluate import divergence, relative_error, worst
from mla_compile.verification.agreement import ROUNDING_FACTOR, TOLERANCE, in_float32

__all__ = [
    "DEFAULT_SHARD",
    "ExpectedAnswers",
    "FolderCheck",
    "StagedCheckpoint",
    "check_folder",
    "new_checkpoint",
    "read_expected",
    "verify_folder",
    "write_checkpoint",
]

DEFAULT_SHARD = 5 * 10**9
"""Bytes per file of weights, at most."""
_GREEDY = 64
_PROMPT = 64
_KEPT = 2**22
"""Logits that are kept to compare with, at most."""
_UNLIKE = "Nothing was written. Blocks named like Llama's may compute something else: write a .onnx file instead."
_ROUNDED = "Nothing was written. Convert the model in float32: it bears the roundings of bfloat16 badly."
_EXPECTED, _STEM = "expected.npz", "model"
_WEIGHTS = re.compile(rf"{_STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors|{_STEM}\.safetensors\.index\.json")


@dataclass(frozen=True)
class ExpectedAnswers:
    """What the converted module answered.

    Attributes:
        ids: ``[length]`` tokens, of which the last ``greedy`` were its own most likely ones.
        greedy: How many.
        logits: ``[positions, vocabulary]`` of the last positions, in float32.
        tolerance: Largest relative difference of logits that is taken for rounding.
    """

    ids: Tensor
    greedy: int
    logits: Tensor
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class FolderCheck:
    """What stock transformers made of a folder.

    Attributes:
        error: Of its logits: ``max |difference| / max |logit|``.
        greedy: Greedy tokens that are equal, as a fraction.
        cache_bytes_per_token: What its cache held, in float32.
        norm_error: Largest relative error that norms of latents made.
        without_biases: Divergence from the same predictions in nats per token, if biases of attention are left out;
            None where there are none.
    """

    error: float
    greedy: float
    cache_bytes_per_token: float
    norm_error: float
    without_biases: float | None


@dataclass(frozen=True)
class StagedCheckpoint:
    """A checkpoint that was made and checked, and is not in its place yet.

    Attributes:
        folder: The hidden folder that it is in.
        facts: What was measured of it.
        notes: What the user should know of it.
    """

    folder: Path
    facts: CheckpointFacts
    notes: tuple[str, ...]


def check_folder(path: Path, force: bool) -> None:
    """Refuse a folder that cannot be written, before any work is done.

    Raises:
        UsageError: It is a file, is not empty, or its own folder cannot be written.
    """
    if path.suffix in (".onnx", ".safetensors", ".json") or path.is_file():
        raise UsageError(f"'{path}' names a file, and a checkpoint is a folder.", "Name a folder.")
    check_place(path, force)


def write_checkpoint(
    module: LatentModel,
    report: Report,
    assets: Assets,
    path: Path,
    checks: Tensor | None,
    *,
    shard: int,
    force: bool,
    stages: Stages,
) -> Report:
    """Write a converted model as a stock DeepSeek-V3 checkpoint; the folder is there only when the check passed.

    Args:
        module: The converted model.
        report: What was done so far.
        assets: Configuration and tokenizer of the original.
        path: The folder.
        checks: Token ids ``[batch, length]`` to compare on; random ones when None.
        shard: Bytes per file of weights, at most; a larger tensor has a file of its own.
        force: Replace existing files.
        stages: Times and shows what runs.

    Returns:
        The completed report, also written as ``report.json``.

    Raises:
        UsageError: The folder cannot be written, or the model was converted with another layout.
        LoadError: The model has no configuration.
        RefusedError: Its blocks are not those of such a checkpoint.
        VerificationError: Stock transformers computes something else.
    """
    stored = report.to_dict()
    blueprint = read_blueprint(stored)
    with new_checkpoint(
        module, blueprint, stored, assets, path, checks, shard=shard, force=force, stages=stages
    ) as made:
        report = dataclasses.replace(report, checkpoint=made.facts, warnings=(*report.warnings, *made.notes))
        return finished(report, made.folder, stages)


@contextlib.contextmanager
def new_checkpoint(
    module: LatentModel,
    blueprint: Blueprint,
    report: Mapping[str, Any],
    assets: Assets,
    path: Path,
    checks: Tensor | None,
    *,
    shard: int,
    force: bool,
    stages: Stages,
) -> Iterator[StagedCheckpoint]:
    """Make a checkpoint in a hidden folder, and check it; it goes to its place when its report has been added.

    Args:
        module: The converted model.
        blueprint: What its conversion fixed.
        report: What was done so far, as it is stored.
        assets: Configuration and tokenizer of the original.
        path: Where it goes.
        checks: Token ids ``[batch, length]`` to compare on; random ones when None.
        shard: Bytes per file of weights, at most; a larger tensor has a file of its own.
        force: Replace existing files.
        stages: Times and shows what runs.

    Raises:
        UsageError: The folder cannot be written.
        LoadError: The model has no configuration.
        RefusedError: Its blocks are not those of such a checkpoint.
        VerificationError: Stock transformers computes something else.
    """
    check_folder(path, force)
    checkpoint = stock_checkpoint(module, blueprint, assets.config)
    check_neighbours(path, report["source"], dataclasses.replace(assets, config=checkpoint.config), force)
    with moved_into(path) as folder:
        made = _make(module, checkpoint, assets, folder, checks, shard, stages)
        write_settings(report["config"], folder)
        (folder / "README.md").write_text(_card(report, made.facts), encoding="utf-8")
        yield made
        written = {file.name for file in folder.iterdir()}
    for file in _weight_files(path):
        if file.name not in written:  # of an earlier checkpoint, which --force replaced
            file.unlink()


def _make(
    module: LatentModel,
    checkpoint: Checkpoint,
    assets: Assets,
    folder: Path,
    checks: Tensor | None,
    shard: int,
    stages: Stages,
) -> StagedCheckpoint:
    """Write configuration, tokenizer, weights and answers; in bfloat16 only after the same in float32 was right."""
    dtype = cache_dtype(module.graph)
    written_in = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    copy_assets(dataclasses.replace(assets, config=checkpoint.config), folder)
    with stages.stage("write checkpoint"):
        _write_weights(checkpoint, folder, shard, torch.float32)
    with stages.stage("verify checkpoint"):
        expected = _answers(in_float32(module), checks, checkpoint)
        _keep(expected, folder)
        found = _compare(folder, expected, _UNLIKE)
    rounded = None
    if dtype == torch.bfloat16:
        for file in _weight_files(folder):
            file.unlink()
        copy_assets(dataclasses.replace(assets, config={**checkpoint.config, "dtype": "bfloat16"}), folder)
        with stages.stage("write checkpoint in bfloat16"):
            _write_weights(checkpoint, folder, shard, dtype)
        with stages.stage("verify bfloat16"):
            usual = max(_rounding(module, expected), torch.finfo(dtype).eps)
            expected = dataclasses.replace(expected, tolerance=ROUNDING_FACTOR * usual)
            _keep(expected, folder)
            rounded = _compare(folder, expected, _ROUNDED).error
    facts = CheckpointFacts(
        latent=int(checkpoint.config["kv_lora_rank"]),
        rope=int(checkpoint.config["qk_rope_head_dim"]),
        cache_bytes_per_token=checkpoint.cached_elements * written_in.itemsize,
        norm_error=checkpoint.norm_error,
        error=found.error,
        greedy=found.greedy,
        caveats=_priced(checkpoint.caveats, found),
        cache_bytes_measured=found.cache_bytes_per_token * written_in.itemsize / torch.float32.itemsize,
        norm_error_measured=found.norm_error,
        without_biases=found.without_biases,
        dtype=type_name(written_in),
        rounding_error=rounded,
    )
    notes = [f"this checkpoint is for transformers only: {caveat}" for caveat in facts.caveats]
    if dtype == torch.float16:
        notes.append("the checkpoint is in float32: float16 cannot hold the small latents in front of their norm")
    return StagedCheckpoint(folder, facts, tuple(notes))


def verify_folder(folder: Path) -> FolderCheck:
    """Load a checkpoint in stock transformers, and compare it with what the converted module answered.

    Args:
        folder: A folder written by :func:`write_checkpoint`.

    Raises:
        LoadError: It is no such folder, or cannot be loaded.
        VerificationError: It answers something else.
    """
    expected = read_expected(folder)
    if expected is None:
        raise LoadError(
            f"'{folder}' holds no '{_EXPECTED}' with the answers to compare with.",
            "Give a folder written by mla-compile with --format deepseek.",
        )
    return _compare(folder, expected, "Copy the folder again, or convert the model again.")


def read_expected(folder: Path) -> ExpectedAnswers | None:
    """What the converted module answered, as :func:`write_checkpoint` keeps it; None where nothing was kept.

    Raises:
        LoadError: What was kept is damaged.
    """
    file = folder / _EXPECTED
    if not file.is_file():
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
            ids, logits = (torch.from_numpy(kept[name]) for name in ("ids", "logits"))
            return ExpectedAnswers(ids, int(kept["greedy"]), logits, float(kept["tolerance"]))
    except Exception as error:  # of zipfile, of zlib, or an early end
        raise LoadError(
            f"'{file}', with the answers to compare with, is damaged ({reason_of(error)}).",
            "Copy the folder again, or convert the model again.",
        ) from error


def _rounding(module: LatentModel, expected: ExpectedAnswers) -> float:
    """What the roundings of its type change in the converted model's logits."""
    with torch.inference_mode():
        logits = module(expected.ids[None]).logits[0, -len(expected.logits) :].float()
    return relative_error(logits, expected.logits)


def _write_weights(checkpoint: Checkpoint, folder: Path, limit: int, dtype: torch.dtype) -> None:
    """Write files of at most ``limit`` bytes, named and cut as transformers names and cuts them."""
    cuts = list(_cut(checkpoint.shapes, limit, dtype.itemsize))
    tensors = checkpoint.tensors()
    index: dict[str, str] = {}
    for number, names in enumerate(cuts, 1):
        file = f"{_STEM}.safetensors" if len(cuts) == 1 else f"{_STEM}-{number:05d}-of-{len(cuts):05d}.safetensors"
        part = {name: value.to(dtype) for name, value in itertools.islice(tensors, len(names))}
        save_file(part, folder / file, {"format": "pt"})
        del part
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody else read it
        index |= dict.fromkeys(names, file)
    if len(cuts) > 1:
        numbers = sum(shape.numel() for shape in checkpoint.shapes.values())
        total = {"total_parameters": numbers, "total_size": numbers * dtype.itemsize}
        content = {"metadata": total, "weight_map": index}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / f"{_STEM}.safetensors.index.json").write_text(text, encoding="utf-8")


def _weight_files(folder: Path) -> list[Path]:
    """Files in a folder that are named as :func:`_write_weights` names them."""
    return [file for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name)]


def _cut(shapes: Mapping[str, torch.Size], limit: int, itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = shape.numel() * itemsize
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _answers(module: LatentModel, checks: Tensor | None, checkpoint: Checkpoint) -> ExpectedAnswers:
    """What the module says on some text, and how it goes on."""
    if checks is None:
        vocabulary = int(checkpoint.config["vocab_size"])
        checks = torch.randint(0, vocabulary, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    longest = int(checkpoint.config["max_position_embeddings"])
    prompt = checks[0, : min(_PROMPT, max(1, longest - _GREEDY))].tolist()
    count = max(1, min(_GREEDY, longest - len(prompt)))
    ids = torch.tensor(prompt + generate(TorchDecoder(module), [prompt], count)[0])
    with torch.inference_mode():
        logits = module(ids[None]).logits[0].float()
    return ExpectedAnswers(ids, count, logits[-max(count + 1, _KEPT // logits.shape[1]) :].clone())


def _keep(expected: ExpectedAnswers, folder: Path) -> None:
    values: dict[str, Any] = {
        "ids": expected.ids.numpy(),
        "greedy": expected.greedy,
        "logits": expected.logits.numpy(),
        "tolerance": expected.tolerance,
    }
    np.savez(folder / _EXPECTED, **values)


def _compare(folder: Path, expected: ExpectedAnswers, remedy: str) -> FolderCheck:
    """Compare a folder in stock transformers with what the converted module answered.

    Logits are those of the whole text at once, and of its last part token by token with a cache. Where they pass, other
    tokens follow only where two were as likely.

    Raises:
        VerificationError: Logits differ by more than rounding.
    """
    model: Any = huggingface.read_checkpoint(str(folder), "sdpa").float()
    ids, count = expected.ids[None], expected.greedy
    norms = [part for name, part in model.named_modules() if name.endswith("_a_layernorm")]
    changes = [0.0]
    hooks = [
        norm.register_forward_hook(
            lambda norm, inputs, _: changes.append(
                float(inputs[0].double().square().mean(-1).max()) / (2 * norm.variance_epsilon)
            )
        )
        for norm in norms
    ]
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits[0, -len(expected.logits) :]
        for hook in hooks:
            hook.remove()
        step = model(ids[:, :-count], use_cache=True)
        steps = [step.logits[0, -1]]
        for token in ids[0, -count:-1]:
            step = model(token.view(1, 1), past_key_values=step.past_key_values, use_cache=True)
            steps.append(step.logits[0, -1])
    cached = torch.stack(steps)
    error = worst(relative_error(whole, expected.logits), relative_error(cached, expected.logits[-count - 1 : -1]))
    if not error <= expected.tolerance:
        raise VerificationError(
            f"The checkpoint in stock transformers differs from the converted PyTorch module by {error:.1e} of the "
            f"largest logit (allowed: {expected.tolerance:.0e}).",
            remedy,
        )
    return FolderCheck(
        error=error,
        greedy=float((cached.argmax(-1) == expected.ids[-count:]).float().mean()),
        cache_bytes_per_token=_bytes_held(step.past_key_values) / (ids.shape[1] - 1),
        norm_error=max(changes),
        without_biases=_without_biases(model, ids, whole),
    )


def _bytes_held(cache: Any) -> int:  # noqa: ANN401 - transformers' own
    """Bytes of the tensors that a cache holds."""
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def _without_biases(model: Any, ids: Tensor, whole: Tensor) -> float | None:  # noqa: ANN401 - transformers' own
    """What predictions lose, in nats per token, in an engine that leaves the biases of attention out."""
    biases = [p for name, p in model.named_parameters() if ".self_attn." in name and name.endswith(".bias")]
    if not biases:
        return None
    with torch.inference_mode():
        for bias in biases:
            bias.zero_()
        without = model(ids, use_cache=False).logits[0, -len(whole) :]
    right, wrong = (x.double().log_softmax(-1) for x in (whole, without))
    return float(divergence(right, wrong)) / len(whole)


def _priced(caveats: Sequence[str], found: FolderCheck) -> tuple[str, ...]:
    """Caveats, with what leaving out biases would cost."""
    cost = f" (leaving them out costs {found.without_biases:.2g} nats per token)" if found.without_biases else ""
    return tuple(f"{caveat}{cost}" if "biases" in caveat else caveat for caveat in caveats)


def _card(report: Mapping[str, Any], facts: CheckpointFacts) -> str:
    """The model card."""
    source = str(report["source"])
    name = Path(source).name if Path(source).exists() else source
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {name}",
        "tags: [mla, deepseek_v3, mla-compile]",
        "---",
        "",
        f"# {name} with multi-head latent attention",
        "",
        f"Converted from `{name}` by mla-compile; the attention of every layer caches one latent of {facts.latent} "
        f"numbers and one rope key of {facts.rope} per token. The architecture is stock `DeepseekV3ForCausalLM`, "
        "all layers dense: there is no remote code.",
        "",
        "| | |",
        "|---|---|",
        f"| cache bytes per token, {facts.dtype} "
        f"| {report['cache']['bytes_per_token_before']} -> {facts.cache_bytes_per_token} |",
        f"| the same, measured in transformers | {facts.cache_bytes_measured:g} |",
        *_quality(report["quality"]),
        *_training(report["training"]),
        f"| checkpoint in transformers against the converted module | {facts.error:.1e} of the largest logit |",
        f"| greedy tokens of the two that are equal | {facts.greedy:.0%} |",
        f"| norm of the latent, which is made to do nothing | changes it by less than {facts.norm_error:.1e} "
        f"({facts.norm_error_measured:.1e} on the text compared) |",
        "",
        *_usage(facts),
        "",
        "`mla-compile verify FOLDER` repeats the check with what the converted module answered (`expected.npz`). "
        f"Settings are in `{SETTINGS}`, everything else in `{REPORT}`.",
        "",
    ]
    return "\n".join(lines)


def _quality(quality: Mapping[str, Any] | None) -> list[str]:
    if quality is None:
        return []
    change = f"{quality['original']:.4f} -> {quality['converted']:.4f}"
    return [f"| perplexity, {quality['tokens']} {text_kind(quality)} tokens | {change} |"]


def _training(training: Mapping[str, Any] | None) -> list[str]:
    if training is None:
        return []
    change = f"{training['before']:.4f} -> {training['after']:.4f} nats per token"
    return [f"| loss on held-out text, fine-tuned on {training['tokens']} tokens | {change} |"]


def _usage(facts: CheckpointFacts) -> list[str]:
    lines = ["Load it in float32 or bfloat16; float16 cannot hold the small latents in front of their norm."]
    if facts.rounding_error is not None:
        lines.append(f"Weights are in bfloat16, which changes logits by {facts.rounding_error:.1e} of the largest.")
    if facts.caveats:
        return [*lines, "", f"Only transformers computes this checkpoint: {'; '.join(facts.caveats)}."]
    return [*lines, "", "vLLM and SGLang have the same architecture, but neither was run on this checkpoint."]
