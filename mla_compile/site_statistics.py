"""What methods know of a layer on text: measured once, and kept on disk between conversions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["SiteStatistics"]


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site over ``N`` tokens, in float64; ``E`` is the mean over tokens.

    Attributes:
        tokens: ``N``.
        mean: ``[width]``, ``E x`` of the input of keys and values.
        moment: ``[width, width]``, ``E x x^T``.
        query: ``[H, D, D]``, ``E f_m q_m q_m^T`` with ``f_m = sum_j (dL/ds_mj)^2`` and ``s`` the scaled logits.
        distance: ``[H, T]``, share of ``(dL/ds)^2`` at every distance between query and key; sums to 1.
        output: ``[H, Dv, Dv]``, ``E (dL/do)(dL/do)^T``.
        attended: ``[H]``, ``E |o|^2 / E |v|^2``: how much of the values' variance is left after averaging.
        key_squares: ``[n]``, ``E s_g^2`` of what every key head's norm multiplies it with; None where keys have none.
        key_moment: ``[width, width]``, ``E mean_g s_g^2 x x^T``; None where keys have no norm, and it is ``moment``.
        key_mean: ``[width]``, ``E mean_g s_g^2 x``; None where keys have no norm, and it is ``mean``.
    """

    tokens: int
    mean: Tensor
    moment: Tensor
    query: Tensor
    distance: Tensor
    output: Tensor
    attended: Tensor
    key_squares: Tensor | None = None
    key_moment: Tensor | None = None
    key_mean: Tensor | None = None
