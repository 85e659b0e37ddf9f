"""What of TensorRT and a GPU is there, asked before any work that needs them, and what TensorRT says of itself."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from mla_compile.errors import UsageError

__all__ = ["Messages", "architecture", "messages", "require_device", "require_tensorrt", "start"]


@dataclass(frozen=True, slots=True)
class Messages:
    """What TensorRT said.

    Attributes:
        logger: Who it says it to.
        errors: All errors, in order.
    """

    logger: Any
    errors: list[str]

    @property
    def reason(self) -> str:
        """The last error, short."""
        said = self.errors[-1] if self.errors else "it does not say why"
        return " ".join(said.split())[:300].rstrip(".")


def require_tensorrt(module: str = "tensorrt") -> Any:  # noqa: ANN401 - a module without types
    """Import TensorRT, or a part of it.

    Raises:
        UsageError: It is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(module)
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
            "Engines are built and run on the GPU they are for, and there is none here that torch can use.",
            "Use a machine with an NVIDIA GPU and torch for CUDA; the .onnx file for it can be written here with "
            "--target tensorrt.",
        )


def architecture() -> int:
    """Compute capability of the GPU in use, as 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def messages(trt: Any) -> Messages:  # noqa: ANN401
    """A logger that prints nothing and keeps errors."""
    errors: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message)

    return Messages(Logger(), errors)


def start(kind: Any, said: Messages) -> Any:  # noqa: ANN401
    """Make TensorRT's builder or runtime, which is where it first talks to the GPU.

    Raises:
        UsageError: It does not start.
    """
    try:
        return kind(said.logger)
    except (RuntimeError, TypeError) as error:  # bindings raise TypeError for a null pointer
        raise UsageError(
            f"TensorRT does not start ({said.reason}).", "Check that the GPU's driver is new enough for it."
        ) from error
