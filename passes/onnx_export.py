"""From an exported program to an ONNX model, by torch's own exporter; and from the model to its file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from onnxscript.version_converter import convert_version
from torch.export import ExportedProgram

from mla_compile.disk.mapped import Passing
from mla_compile.errors import MlaCompileError, RefusedError, first_line
from mla_compile.passes.onnx_translations import translations
from mla_compile.passes.real_pairs import write_pairs
from mla_compile.quiet import quiet_exporter
from mla_compile.runtime.onnx_checksum import CHECKSUM_KEY, weights_checksum

__all__ = ["EXTERNAL_DATA_BYTES", "METADATA_KEY", "exported_to_onnx", "name_dimensions", "save"]

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Weights above this go to a data file beside the model: a protobuf file cannot exceed 2 GB."""
METADATA_KEY = "mla_compile"
_EXPORTED = 23
"""The exporter fuses norms for this operator set only; a later one is made from its result."""


def exported_to_onnx(exported: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], opset: int) -> ir.Model:
    """Translate an exported program, which is used up; inputs and outputs get these names."""
    write_pairs(exported)
    with _explained(), quiet_exporter():
        program = torch.onnx.export(
            exported,
            (),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=_EXPORTED,
            custom_translation_table=dict(translations()),
            dynamo=True,
            verbose=False,
            optimize=True,
        )
    model: ir.Model = program.model  # type: ignore[union-attr]
    convert_version(model, opset)
    return model


def name_dimensions(model: ir.Model, names: Mapping[str, tuple[str, ...]]) -> None:
    """Give the first two dimensions of inputs and outputs, or the only one, the names users know."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        dimensions = names.get(value.name or "")
        if dimensions is not None and value.shape is not None:
            value.shape = ir.Shape([*dimensions, *value.shape.dims[2:]])


def save(model: ir.Model, path: Path, metadata: Mapping[str, object]) -> None:
    """Complete a model with names and metadata, and write it; weights above 1.5 GB go to ``<path>.data``."""
    model.producer_name = "mla-compile"
    model.graph.name = "latent_attention_model"
    model.metadata_props[METADATA_KEY] = json.dumps(metadata, sort_keys=True)
    weights = sorted((name, v.const_value) for name, v in model.graph.initializers.items() if v.const_value is not None)
    passing = Passing()
    model.metadata_props[CHECKSUM_KEY] = weights_checksum((name, passing(weight).tobytes()) for name, weight in weights)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    beside = f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None
    ir.save(model, path, external_data=beside, callback=passing.see)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn the exporter's report of a failure into a sentence that names the operator at fault."""
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        for link in chain:
            if isinstance(link, MlaCompileError):  # one of ours, which torch has wrapped or passed on
                raise link from None
        operators = [m[1] for link in chain if (m := re.search(r"op='([^']+)'", str(link)))]
        reason = f"there is no ONNX form of '{operators[-1]}'" if operators else first_line(chain[-1])
        raise RefusedError(
            f"The converted model cannot be lowered to ONNX: {reason}.",
            "Write the operation with others in the model, or keep the PyTorch module (a folder as --out).",
        ) from error
