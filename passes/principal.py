"""Principal components of what a layer's keys and values are on text: ``rows @ x`` for inputs of a known moment.

There are no more of them than inputs. Keys and values of a layer without grouped queries are twice as many, and an
eigenvalue problem of their number would take eight times as long as one of the inputs', for as many zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["principal_components"]


def principal_components(rows: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenvectors of ``rows @ moment @ rows.T``, the second moment of ``rows @ x``.

    Where there are more rows than inputs, they are ``basis @ inner`` with orthonormal columns (QR). Then the
    eigenvectors are the basis times those of ``inner @ moment @ inner.T``: no square is taken of the rows that the full
    problem does not take too, so that the result is as accurate (both are backward stable, with errors of some 1e-16 of
    the largest eigenvalue).

    Args:
        rows: ``[n, width]``, float64.
        moment: ``[width, width]``, ``E x x^T``.

    Returns:
        ``[k]`` eigenvalues, falling, ``k = min(n, width)``, some below 0 by rounding; ``[n, k]`` unit eigenvectors, the
        largest entry of each positive; and ``[k, width]``, these by the rows.
    """
    tall = rows.shape[0] > rows.shape[1]
    basis, inner = torch.linalg.qr(rows) if tall else (None, rows)
    values, own = torch.linalg.eigh(inner @ moment @ inner.mT)
    values, own = values.flip(0)[: rows.shape[1]], own.flip(1)[:, : rows.shape[1]]
    vectors = own if basis is None else basis @ own
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return values, vectors * signs, (own * signs).mT @ inner
