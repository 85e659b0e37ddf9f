"""The error tree: whose fault it is, which exit code it ends with, and what to do about it.

Every failure a user can cause is a :class:`MlaCompileError` whose text is a sentence saying what went wrong and where,
followed by a remedy. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "LoadError",
    "MlaCompileError",
    "QualityGateError",
    "RefusedError",
    "ShareDone",
    "TrainingError",
    "UsageError",
    "VerificationError",
    "first_line",
    "reason_of",
]


class MlaCompileError(Exception):
    """A failure with one sentence for the user, a remedy, and the exit code of the command line.

    Args:
        message: What failed and where: one sentence, full stop included.
        remedy: What the user can do next; an imperative sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message} {remedy}")
        self.message = message
        self.remedy = remedy


class UsageError(MlaCompileError):
    """A flag, path or value that cannot be used (exit code 2)."""

    exit_code = 2


class LoadError(UsageError):
    """The model, tokenizer or text could not be read (exit code 2)."""


class RefusedError(MlaCompileError):
    """Nothing was matched, or some attention layer cannot be converted correctly (exit code 3)."""

    exit_code = 3


class QualityGateError(MlaCompileError):
    """The conversion is correct but loses more than the user allowed (exit code 4)."""

    exit_code = 4


class VerificationError(MlaCompileError):
    """The converted model does not compute what it should; no output is left behind (exit code 5)."""

    exit_code = 5


class TrainingError(MlaCompileError):
    """Training cannot go on; the last good checkpoint is kept (exit code 6)."""

    exit_code = 6


class ShareDone(Exception):
    """Raised in every process but the first of several when its share of the work is done: it has no more to do."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else says, to stand in a sentence: its first line, or its name where it is silent.

    A line that only announces the next one, by a colon, is followed by it.
    """
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    following = next((line.strip() for line in others if line.strip()), "")
    told = f"{first} {following}" if first.endswith(":") else first
    return told[:200].rstrip(".: ")


def reason_of(error: BaseException) -> str:
    """Which error of somebody else it is, and what its first line says; of one of ours, what it says."""
    if isinstance(error, MlaCompileError):
        return error.message
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name
