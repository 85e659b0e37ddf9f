"""The command line: parse, call, show, exit code. Nothing here computes, and nothing imports torch at start."""

from __future__ import annotations

from mla_compile.cli.app import main

__all__ = ["main"]
