"""Compile a trained transformer's attention into Multi-head Latent Attention with a small key-value cache.

Public names are imported from their home modules on first use, so that ``import mla_compile`` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "CompileConfig",
    "CompiledModel",
    "MlaCompileError",
    "Recipe",
    "compile",
    "finetune",
    "inspect",
    "load",
    "register_pattern",
    "save",
]

if TYPE_CHECKING:
    from mla_compile.api import compile, inspect, load
    from mla_compile.artifacts.saved import save
    from mla_compile.config import CompileConfig
    from mla_compile.conversion.compiled import CompiledModel
    from mla_compile.errors import MlaCompileError
    from mla_compile.sources.patterns import register_pattern
    from mla_compile.training.recipe import Recipe
    from mla_compile.training.run import finetune

    __version__: str
else:  # hidden from type checkers, to whom a module __getattr__ would make every misspelt name valid
    _HOMES = {
        "CompileConfig": "mla_compile.config",
        "CompiledModel": "mla_compile.conversion.compiled",
        "MlaCompileError": "mla_compile.errors",
        "Recipe": "mla_compile.training.recipe",
        "compile": "mla_compile.api",
        "finetune": "mla_compile.training.run",
        "inspect": "mla_compile.api",
        "load": "mla_compile.api",
        "register_pattern": "mla_compile.sources.patterns",
        "save": "mla_compile.artifacts.saved",
    }

    def __getattr__(name: str) -> object:
        """Import a public name from its home module, and keep it for the next use."""
        if name == "__version__":
            from importlib.metadata import version

            value = version("mla-compile")
        elif name in _HOMES:
            from importlib import import_module

            value = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """List the public names too, whether or not they were used yet."""
        return sorted({*globals(), *__all__, "__version__"})
