"""Lower an encoder to ONNX: standard operators only, for a whole sequence attends to itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from mla_compile.passes.evaluate import example_inputs
from mla_compile.passes.layout import Sizes
from mla_compile.passes.onnx_export import exported_to_onnx, save
from mla_compile.program import AnyProgram
from mla_compile.quiet import quiet_exporter
from mla_compile.runtime import ops  # noqa: F401 - registers the operators
from mla_compile.runtime.attention import attend_unfolded, rotate_and_append
from mla_compile.runtime.masks import open_keys

__all__ = ["ENCODER_LENGTH", "EncoderFace", "export_encoder", "lower_encoder_to_onnx"]

ENCODER_LENGTH = "encoder_sequence_length"
"""What users call the number of an encoder's tokens."""
_BATCH = 2


@dataclass(frozen=True)
class EncoderFace:
    """What a rewritten encoder takes and returns.

    Attributes:
        program: The original.
        sizes: Of one of its layers, which say what lengths there are.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order, with their symbolic shapes.
    """

    program: AnyProgram
    sizes: Sizes
    inputs: tuple[str, ...]
    outputs: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, program: AnyProgram, sizes: Sizes) -> EncoderFace:
        """Of a whole model."""
        nodes = {n.name: n for n in program.exported.graph.nodes}
        outputs = {name: tuple(nodes[node].meta["val"].shape) for name, node in program.outputs.items()}
        return cls(program, sizes, tuple(program.user_inputs), outputs)

    def dimensions(self, shape: Sequence[Any]) -> list[int | str]:
        """A symbolic shape in the words of users."""
        names = {str(s): "batch_size" for s in (*self.sizes.batches, self.sizes.batch)}
        names |= {str(self.sizes.length): "sequence_length"}
        names |= {str(self.sizes.keys): ENCODER_LENGTH} if self.sizes.cross else {}
        return [d if isinstance(d, int) else names.get(str(d), f"size_{d}") for d in shape]


def export_encoder(module: nn.Module, face: EncoderFace) -> ExportedProgram:
    """Export a rewritten encoder, dynamic where the original is.

    Args:
        module: From :mod:`~mla_compile.passes.insert_low_rank`.
        face: Its inputs and outputs.
    """
    made = example_inputs(face.program, _BATCH, face.sizes.short, sizes=face.sizes)
    example = tuple(made[name] for name in face.inputs)
    given = [face.program.user_inputs[name][1] for name in face.inputs]
    shapes = tuple({i: Dim.AUTO for i, d in enumerate(value.shape) if not isinstance(d, int)} for value in given)
    with torch.no_grad(), quiet_exporter():
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


def lower_encoder_to_onnx(
    module: fx.GraphModule, face: EncoderFace, path: Path, *, opset: int, metadata: Mapping[str, object]
) -> None:
    """Write a rewritten encoder as an ONNX file of standard operators.

    A whole sequence attends to itself, so keys and values are made from the latent first: attending to the latent
    itself, as a node of ours would, pays only where few queries meet many keys.

    Args:
        module: The rewritten graph.
        face: Its inputs and outputs.
        path: File to write.
        opset: Standard operator set, 23 or later.
        metadata: JSON-able facts stored in the model's metadata under ``mla_compile``.
    """
    unfolded = copy.copy(module)
    unfolded.graph = copy.deepcopy(module.graph)
    for node in unfolded.graph.nodes:
        if node.target is torch.ops.mla.latent_attention.default:
            node.target = _unfolded_attention
    unfolded.recompile()
    model = exported_to_onnx(export_encoder(unfolded, face), face.inputs, list(face.outputs), opset)
    shapes = {name: face.program.user_inputs[name][1].shape for name in face.inputs} | dict(face.outputs)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(face.dimensions(shapes[value.name or ""]))
    save(model, path, metadata)


def _unfolded_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    value_scales: int,
    causal: bool,
    scaled_rope: bool,
) -> tuple[Tensor, Tensor]:
    """``mla::latent_attention`` of a sequence to itself in standard operators."""
    query, present = rotate_and_append(query, row, past, cos, sin, key_up.shape[2])
    mask = open_keys(attention_mask, query.shape[1]).unsqueeze(1)
    up = (key_up, value_up, cos.shape[2])
    attended = attend_unfolded(query, present, mask, *up, sinks, scale, softcap, value_scales, scaled_rope)
    return attended, present
