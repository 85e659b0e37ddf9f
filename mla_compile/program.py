"""A loaded model in the one form every pass reads: an exported graph plus what its inputs and outputs mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mla_compile.quiet import quiet_exporter

__all__ = ["Assets", "Program"]


@dataclass(frozen=True)
class Assets:
    """What travels beside a model: configuration, generation settings and the tokenizer's folder.

    Attributes:
        folder: Folder (or hub id) the tokenizer is loaded from, if any.
        config: The model's ``config.json`` as a mapping; empty when the model has none.
        generation: The model's ``generation_config.json`` as a mapping.
        tokenizer: A tokenizer in memory, where there is no folder.
    """

    folder: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None

    @property
    def local_folder(self) -> Path | None:
        """The asset folder when it is on this machine."""
        return Path(self.folder) if self.folder and Path(self.folder).is_dir() else None


@dataclass(frozen=True)
class Program:
    """An exported causal language model without a cache: token ids in, logits of every position out.

    The graph is functional ATen after ``run_decompositions({})``: linear and scaled-dot-product attention survive.

    Attributes:
        exported: The graph, its signature and its weights.
        source: What the user named it: a path, a hub id or a class name.
        kind: ``pt2``, ``huggingface`` or ``module``.
        tokens: Placeholder of the token ids ``[batch, length]``.
        attention_mask: Placeholder of the padding mask ``[batch, length]``, if the graph takes one.
        position_ids: Placeholder of the positions ``[batch, length]``, if the graph takes them.
        logits: Graph node of the logits ``[batch, length, vocabulary]``.
        assets: Configuration and tokenizer that travel with it.
        max_positions: Longest sequence the model was built for, if known.
    """

    exported: ExportedProgram
    source: str
    kind: str
    tokens: str
    attention_mask: str | None
    position_ids: str | None
    logits: str
    assets: Assets = field(default_factory=Assets)
    max_positions: int | None = None

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows: the rows of the smallest table its tokens index."""
        nodes = {n.name: n for n in self.exported.graph.nodes}
        tokens = nodes[self.tokens]
        embedding = torch.ops.aten.embedding.default
        rows = [
            int(user.args[0].meta["val"].shape[0])
            for user in tokens.users
            if user.target is embedding and user.args[1] is tokens
        ]
        return min(rows) if rows else int(nodes[self.logits].meta["val"].shape[-1])

    def flat_module(self) -> fx.GraphModule:
        """Return the graph as a module of positional tensors in placeholder order, with weights shared."""
        with quiet_exporter():
            original = self.exported.module(check_guards=False)
        module = fx.GraphModule(original, original.graph)
        module.graph.set_codegen(fx.graph.CodeGen())
        output = next(n for n in module.graph.nodes if n.op == "output")
        output.args = (next(n for n in module.graph.nodes if n.name == self.logits),)
        module.recompile()
        return module

    def inputs(self, ids: Tensor) -> list[Tensor]:
        """Arguments of :meth:`flat_module` for whole, unpadded sequences ``[batch, length]``."""
        given = {self.tokens: ids}
        if self.attention_mask:
            given[self.attention_mask] = torch.ones_like(ids)
        if self.position_ids:
            given[self.position_ids] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return [given[str(name)] for name in self.exported.graph_signature.user_inputs if name in given]

    def constant(self, placeholder: str) -> Tensor:
        """Return the parameter, buffer or lifted constant behind a placeholder.

        Raises:
            KeyError: The placeholder is a user input.
        """
        signature = self.exported.graph_signature
        for table in (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        ):
            if placeholder in table:
                name = table[placeholder]
                found = self.exported.state_dict.get(name, self.exported.constants.get(name))
                if isinstance(found, Tensor):
                    return found
        raise KeyError(placeholder)
