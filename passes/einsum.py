"""Subscripts of an einsum."""

from __future__ import annotations

__all__ = ["einsum_parts"]


def einsum_parts(equation: str) -> tuple[list[str], str]:
    """Split an equation into the subscripts of its operands and of its output.

    An output that is not written is what torch takes it to be: the letters that occur once, in the order of the
    alphabet, behind the axes that an ellipsis stands for.

    Args:
        equation: As ``torch.einsum`` takes it.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        letters = inputs.replace(",", "").replace("...", "")
        output = "..." * ("..." in inputs) + "".join(sorted(c for c in letters if letters.count(c) == 1))
    return inputs.split(","), output
