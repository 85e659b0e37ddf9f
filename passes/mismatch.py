"""The one exception recognisers raise when a sub-graph is not what they read."""

from __future__ import annotations

from mla_compile.site import RejectCode

__all__ = ["MismatchError"]


class MismatchError(Exception):
    """A sub-graph is not what a recogniser reads; becomes a :class:`~mla_compile.site.Rejection`."""

    def __init__(self, code: RejectCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
