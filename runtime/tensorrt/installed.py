"""What of TensorRT and a GPU is there: asked before any work that needs them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from mla_compile.errors import UsageError

__all__ = ["architecture", "require_device", "require_tensorrt"]


def require_tensorrt() -> Any:  # noqa: ANN401 - a module without types
    """Import TensorRT.

    Raises:
        UsageError: It is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise UsageError(
            f"TensorRT cannot be imported ({error}).", "Install it with: pip install 'mla-compile[tensorrt]'."
        ) from error


def require_device() -> None:
    """Check that there is a GPU.

    Raises:
        UsageError: There is none that torch can use.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "An engine is built for the GPU it is built on, and there is none here that torch can use.",
            "Run this on a machine with an NVIDIA GPU and torch for CUDA, or write an .onnx file for it: "
            "mla-compile MODEL --target tensorrt --out FILE.onnx.",
        )


def architecture() -> int:
    """Compute capability of the GPU in use, as 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
