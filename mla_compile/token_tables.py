"""The tables that token ids are looked up in, on a graph."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["tables_of"]

_aten = torch.ops.aten


def tables_of(ids: fx.Node) -> list[fx.Node]:
    """The weights of all embeddings that read token ids, cast to another type or not.

    Args:
        ids: An input of the graph.
    """
    found, readers = [], [ids]
    while readers:
        read = readers.pop()
        readers += [user for user in read.users if user.target is _aten._to_copy.default]
        lookups = [u for u in read.users if u.target is _aten.embedding.default and u.args[1] is read]
        found += [table for u in lookups if isinstance(table := u.args[0], fx.Node)]
    return found
