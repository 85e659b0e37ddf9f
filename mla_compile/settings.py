"""Frozen, validated objects of settings, whose refusals are sentences however they are made."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mla_compile.errors import UsageError

__all__ = ["Settings"]


class Settings(BaseModel):
    """Settings of one command.

    A validator of a class of these raises :class:`ValueError` where leaving one of the settings out helps, and
    :class:`~mla_compile.errors.UsageError`, with a remedy of its own, where something else does.

    Attributes:
        command: The command whose help tells of the settings.

    Raises:
        UsageError: A name is unknown or a value is out of range; the sentence names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    command: ClassVar[str]

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - validated by pydantic
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise _in_a_sentence(type(self), error) from error

    @classmethod
    def of(cls, given: Self | Mapping[str, Any]) -> Self:
        """Take settings as they are, or make them of a mapping.

        Raises:
            UsageError: It is neither; or a name is unknown or a value is out of range.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise UsageError(
                f"Settings are of type {type(given).__name__}.",
                f"Pass a {cls.__name__}, or a dictionary of its fields.",
            )
        return cls(**{str(name): value for name, value in given.items()})


def _in_a_sentence(kind: type[Settings], error: ValidationError) -> UsageError:
    """What is wrong with the first of the settings that cannot be."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    problem = first["msg"].removeprefix("Value error, ").rstrip(".")
    problem = problem[0].lower() + problem[1:]
    if first["type"] == "extra_forbidden":
        meant = difflib.get_close_matches(name, kind.model_fields, 1) or [*kind.model_fields]
        return UsageError(f"There is no setting '{name}'.", f"Use {', '.join(meant)}.")
    if name == "cache_ratio":
        problem += " (a quarter is 0.25)"
    if not name:
        return UsageError(
            f"Settings: {problem}.", f"Leave one of them out; 'mla-compile {kind.command} --help' tells of each."
        )
    return UsageError(
        f"The setting {name}={first['input']!r} is not allowed: {problem}.",
        f"See 'mla-compile {kind.command} --help' for the allowed values.",
    )
