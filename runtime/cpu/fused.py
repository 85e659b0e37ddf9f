"""Make the attention nodes of a file use the fused kernel: their functions get other bodies, nothing else changes."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from mla_compile.runtime.onnx_cache import PAST
from mla_compile.runtime.onnx_function import attention_function, has_fused_form
from mla_compile.runtime.onnx_variant import DOMAIN, FUSED_DOMAIN, LATENT, VERSION, variant_named

__all__ = ["FUSED_CACHES", "fused_model"]

FUSED_CACHES = "it is for caches of float32, float16 and int8, in files written without --inline"
"""What the kernel is for, to stand behind a colon where a file has no such attention."""


def fused_model(path: Path) -> onnx.ModelProto | None:
    """Read a file with functions that use the operators of :mod:`mla_compile.runtime.cpu`.

    Weights that lie beside the file stay there.

    Args:
        path: The ``.onnx`` file.

    Returns:
        The model, or None: no function of it has such a form, or its numbers are neither float32 nor float16.
    """
    model = onnx.load(path, load_external_data=False)
    before, behind = PAST.split("{}")
    caches = [i for i in model.graph.input if i.name.startswith(before) and i.name.endswith(behind)]
    kinds = {cache.type.tensor_type.elem_type for cache in caches}
    float16 = TensorProto.FLOAT16 in kinds
    versions = {o.domain: o.version for o in model.opset_import}
    if not kinds <= {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8} or versions.get(DOMAIN) != VERSION:
        return None
    found = 0
    for function in model.functions:
        variant = variant_named(LATENT, function.name) if function.domain == DOMAIN else None
        if variant is None or not has_fused_form(variant):
            continue
        opset = next(o.version for o in function.opset_import if not o.domain)
        function.CopyFrom(attention_function(LATENT, opset, variant, fused=True, float16=float16))
        found += 1
    if not found:
        return None
    model.opset_import.append(helper.make_opsetid(FUSED_DOMAIN, 1))
    return model
