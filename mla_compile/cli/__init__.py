"""The command line: parse, call, show, exit code. Nothing here computes, and nothing imports torch at start."""

from __future__ import annotations

from mla_compile.cli.program import app, main

__all__ = ["app", "main"]
