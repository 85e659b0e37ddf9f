"""Check encoders and encoder-decoders: the same links as :mod:`mla_compile.verification`, with other inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mla_compile.passes.insert_latent import ENCODER_MASK
from mla_compile.runtime.module import LatentSeq2Seq, LowRankModel
from mla_compile.runtime.onnx_cache import PAST
from mla_compile.runtime.onnx_session import open_session
from mla_compile.text.evaluate import relative_error, worst
from mla_compile.verification.agreement import chunks, in_steps, require_equal, worst_error

__all__ = ["check_encoder_onnx", "check_seq2seq_onnx", "seq2seq_in_chunks", "without_padding"]


def check_encoder_onnx(converted: LowRankModel, path: Path, checks: Sequence[Mapping[str, Tensor]]) -> float:
    """Compare an encoder's ONNX file with its PyTorch module.

    Args:
        converted: The PyTorch module.
        path: The file.
        checks: Inputs by name.

    Returns:
        The worst relative error.

    Raises:
        VerificationError: The runtimes disagree.
    """
    (session, _), error = open_session(path), 0.0
    for inputs in checks:
        with torch.inference_mode():
            expected = converted(**inputs)
        fed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
        got = session.run(list(expected), fed)
        named = {name: torch.from_numpy(value) for name, value in zip(expected, got, strict=True)}
        error = worst(error, worst_error(named, expected))
    require_equal("ONNX Runtime", "the converted PyTorch module", error)
    return error


def without_padding(inputs: Mapping[str, Tensor], mask: str | None) -> dict[str, Tensor]:
    """The same inputs with nothing padded in one mask: a decoder's positions are counted from its own."""
    return {name: torch.ones_like(value) if name == mask else value for name, value in inputs.items()}


def seq2seq_in_chunks(model: LatentSeq2Seq, ids: Tensor, context: Sequence[Tensor]) -> Tensor:
    """Logits of a decoder that is fed part by part."""
    return in_steps(lambda part, mask, past: model(part, context, mask, past=past), ids)


def check_seq2seq_onnx(
    converted: LatentSeq2Seq, files: tuple[Path, Path], tokens: str, checks: Sequence[Mapping[str, Tensor]]
) -> float:
    """Compare the two ONNX files of an encoder-decoder with its PyTorch module, the decoder in pieces.

    Args:
        converted: The PyTorch module.
        files: The encoder's file and the decoder's.
        tokens: Name of the decoder's token input in ``checks``.
        checks: Inputs by name.

    Returns:
        The worst relative error of the logits.

    Raises:
        VerificationError: The runtimes disagree.
    """
    (encoder, _), (decoder, _) = map(open_session, files)
    taken = {i.name for i in decoder.get_inputs()}
    error = 0.0
    for inputs in checks:
        ids, given = inputs[tokens], {name: inputs[name] for name in converted.encoder.inputs}
        with torch.inference_mode():
            expected = converted(ids, converted.encode(**given)).logits
        names = list(converted.encoder.outputs)
        fed = {i.name: given[i.name].numpy() for i in encoder.get_inputs()}
        context = dict(zip(names, encoder.run(names, fed), strict=True))
        if converted.mask is not None:
            context[ENCODER_MASK] = given[converted.mask].numpy()
        cache = [np.zeros((len(ids), 0, row), np.float32) for row in converted.decoder.rows]
        parts: list[np.ndarray] = []
        done = 0
        for size in chunks(ids.shape[1]):
            step = {
                "input_ids": ids[:, done : done + size].numpy(),
                "attention_mask": np.ones((len(ids), done + size), np.int64),
                "position_ids": np.broadcast_to(np.arange(done, done + size), (len(ids), size)).copy(),
                **{PAST.format(i): past for i, past in enumerate(cache)},
                **context,
            }
            logits, *cache = decoder.run(None, {name: value for name, value in step.items() if name in taken})
            parts.append(logits)
            done += size
        error = worst(error, relative_error(torch.from_numpy(np.concatenate(parts, 1)), expected))
    require_equal("ONNX Runtime", "the converted PyTorch module", error)
    return error
