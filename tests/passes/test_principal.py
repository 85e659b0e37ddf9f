"""Principal components of tall and of wide matrices, against the whole eigenvalue problem and a singular values'."""

from __future__ import annotations

import pytest
import torch

from mla_compile.passes.principal import principal_components

SHAPES = {"tall": (48, 20), "twice as tall": (40, 20), "square": (24, 24), "wide": (20, 48)}
# Eigenvalues are right to roundings of the largest one, here some tens of 1e-16 of it.
ROUNDING = 1e-13


def random(salt: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(salt), dtype=torch.float64)


def problem(name: str, kept: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose sizes fall by 100 from the first input to the last, and a moment whose eigenvalues fall by 10 000."""
    n, width = SHAPES[name]
    rows = random(0, n, width) * torch.logspace(0, -2, width, dtype=torch.float64)
    if kept is not None:  # all of one small space of outputs
        rows = random(1, n, kept) @ random(2, kept, width)
    turned = torch.linalg.qr(random(3, width, width))[0] * torch.logspace(0, -2, width, dtype=torch.float64)
    return rows, turned @ turned.mT


@pytest.mark.parametrize("name", SHAPES)
def test_they_are_those_of_the_whole_problem(name):
    rows, moment = problem(name)
    values, vectors, seen = principal_components(rows, moment)
    whole, every = torch.linalg.eigh(rows @ moment @ rows.mT)
    whole, every = whole.flip(0)[: len(values)], every.flip(1)[:, : len(values)]
    assert len(values) == min(rows.shape)
    torch.testing.assert_close(values, whole, rtol=0, atol=ROUNDING * float(whole[0]))
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(len(values)).double(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(seen, vectors.mT @ rows, rtol=0, atol=ROUNDING * float(rows.abs().sum(1).max()))
    places = vectors.abs().argmax(0, keepdim=True)
    assert (vectors.gather(0, places) > 0).all()
    signs = every.gather(0, places).sign()  # the same entry decides
    # A vector is off by roundings over the gap to the next eigenvalue; the first ones are far apart.
    torch.testing.assert_close(vectors[:, :8], (every * signs)[:, :8], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12, 19])
def test_what_they_leave_out_is_the_tail_of_the_singular_values(name, rank):
    """Eckart-Young, without a square of anything: ``rows @ root`` by an SVD of its own."""
    rows, moment = problem(name)
    values, vectors, seen = principal_components(rows, moment)
    root = torch.linalg.cholesky(moment)
    singular = torch.linalg.svdvals(rows @ root)
    error = (rows - vectors[:, :rank] @ seen[:rank]) @ root
    tail = float(singular[rank:].square().sum())
    largest = float(singular[0].square())
    assert float(error.square().sum()) == pytest.approx(tail, rel=1e-9, abs=ROUNDING * largest)
    assert float(values[rank:].sum()) == pytest.approx(tail, rel=1e-9, abs=ROUNDING * largest)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kept", [0, 1, 7])
def test_rows_of_less_than_full_rank_have_orthonormal_components_too(name, kept):
    rows, moment = problem(name, kept)
    values, vectors, seen = principal_components(rows, moment)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(len(values)).double(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(vectors[:, :kept] @ seen[:kept], rows, rtol=1e-9, atol=1e-9)
    assert float(values[kept:].abs().sum()) <= ROUNDING * max(1.0, float(values[0]))


@pytest.mark.parametrize("name", SHAPES)
def test_no_problem_is_larger_than_the_smaller_side(name, monkeypatch):
    sizes, solve = [], torch.linalg.eigh

    def counted(matrix):
        sizes.append(len(matrix))
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    principal_components(*problem(name))
    assert sizes == [min(SHAPES[name])]
