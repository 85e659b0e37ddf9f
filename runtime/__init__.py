"""Runtime: all that a converted model needs in order to run, and nothing of the compiler.

Public names are imported from their home modules on first use, so that importing a part of it costs no more than the
part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# From the root of the tree this folder can also be found as `runtime`, which would make a second copy of every class.
if __name__ != "mla_compile.runtime":
    raise ImportError(f"{__name__!r} is not a package of its own; import mla_compile.runtime instead.")

__all__ = [
    "LatentCache",
    "OnnxDecoder",
    "RowLayout",
    "Sampling",
    "TensorRTDecoder",
    "append_latent",
    "latent_attention",
]

if TYPE_CHECKING:
    from mla_compile.runtime.generate import Sampling
    from mla_compile.runtime.kernels import LatentCache, RowLayout, append_latent, latent_attention
    from mla_compile.runtime.onnx_session import OnnxDecoder
    from mla_compile.runtime.tensorrt.engine import TensorRTDecoder
else:  # hidden from type checkers, to whom a module __getattr__ would make every misspelt name valid
    _HOMES = {
        "LatentCache": "kernels",
        "OnnxDecoder": "onnx_session",
        "RowLayout": "kernels",
        "Sampling": "generate",
        "TensorRTDecoder": "tensorrt.engine",
        "append_latent": "kernels",
        "latent_attention": "kernels",
    }

    def __getattr__(name: str) -> object:
        """Import a public name from its home module, and keep it for the next use."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        globals()[name] = value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        """List the public names too, whether or not they were used yet."""
        return sorted({*globals(), *__all__})
