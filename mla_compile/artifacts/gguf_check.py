"""A file for llama.cpp, checked in llama.cpp against what the converted module answered."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mla_compile.artifacts.checkpoint_folder import ExpectedAnswers
from mla_compile.errors import LoadError, VerificationError
from mla_compile.text.evaluate import relative_error

__all__ = ["GREEDY", "IDS", "LOGITS", "TOLERANCE", "has_llama_cpp", "verify_gguf"]

IDS, GREEDY, LOGITS, TOLERANCE = (f"mla_compile.check.{name}" for name in ("ids", "greedy", "logits", "tolerance"))
"""Keys in a file of the answers that it is checked by."""


def has_llama_cpp() -> bool:
    """Whether llama.cpp is installed for Python, so that a file can be checked in it."""
    return importlib.util.find_spec("llama_cpp") is not None


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


def _kept(path: Path) -> ExpectedAnswers:
    """The answers that a file holds."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        ids, greedy, logits, tolerance = (fields[name].contents() for name in (IDS, GREEDY, LOGITS, TOLERANCE))
        return ExpectedAnswers(torch.tensor(ids), int(greedy), torch.tensor(logits)[None], float(tolerance))
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
