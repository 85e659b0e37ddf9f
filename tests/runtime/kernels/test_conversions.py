"""The kernels' assembly, which the interpreter does not run: emulated here for every byte at every place of a word."""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest
from absorbed_cases import e4m3

pytest.importorskip("triton")

from mla_compile.runtime.kernels import decode

BYTES = np.arange(256, dtype=np.uint32)


def permuted(a, b, selector):
    """``prmt``: byte ``i`` of the result is byte ``selector >> 4 i & 7`` of ``a`` and behind it ``b``."""
    places = [int(selector) >> 4 * i & 15 for i in range(4)]
    assert max(places) < 8, "a sign would be repeated"
    halves = [[x >> np.uint32(8 * i) & np.uint32(255) for i in range(4)] for x in (a, b)]
    pool = [*halves[0], *halves[1]]
    return sum(pool[place] << np.uint32(8 * i) for i, place in enumerate(places))


def looked_up(a, b, c, table):
    """``lop3``: a bit is that of the table at the place which the three bits are the number of."""
    found = a & np.uint32(0)
    for place in range(8):
        if int(table) >> place & 1:
            bits = [x if place >> 2 - i & 1 else ~x for i, x in enumerate((a, b, c))]
            found = found | bits[0] & bits[1] & bits[2]
    return found


def halves_of(word):
    """The two float16 numbers of words, the lower first."""
    return np.asarray(word, "<u4")[..., None].view("<f2")


OPERATIONS = {
    "mov.b32": lambda x: x,
    "xor.b32": operator.xor,
    "and.b32": operator.and_,
    "shr.b32": operator.rshift,
    "prmt.b32": permuted,
    "lop3.b32": looked_up,
    "sub.f16x2": lambda a, b: (halves_of(a) - halves_of(b)).view("<u4")[..., 0],
}


def converted(function, words):
    """What a function's assembly makes of words of four bytes: a list of arrays ``[..., 4]`` of float16."""
    text, constraints = re.search(r'"""\{(.*?)\}""",\s*"([^"]+)"', function.src, re.DOTALL).groups()
    outputs = constraints.count("=")
    registers = {f"${outputs}": words}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in filter(None, (line.strip() for line in text.split(";"))):
        if not line.startswith(".reg"):
            operation, target, *sources = re.split(r"[\s,]+", line)
            registers[target] = OPERATIONS[operation](*map(value, sources))
    results = [halves_of(registers[f"${i}"]) for i in range(outputs)]
    return [np.concatenate(results[i : i + 2], -1) for i in range(0, outputs, 2)]


def everywhere():
    """Every byte at every place, among others; and which bytes each word has."""
    others = np.random.default_rng(0).integers(0, 256, (4, 256, 4), np.uint32)
    for place in range(4):
        others[place, :, place] = BYTES
    return (others << (8 * np.arange(4, dtype=np.uint32))).sum(-1, dtype=np.uint32), others


def check(found, expected):
    words, given = everywhere()
    for got, wanted in zip(converted(found, words), expected, strict=True):
        np.testing.assert_array_equal(got, np.vectorize(wanted, otypes=[np.float64])(given))


def test_int8():
    check(decode._int8_to_half, [lambda byte: byte - 256 * (byte > 127)])


def test_fp8():
    """Without the two bytes that are no number, which nothing writes."""
    words, given = everywhere()
    (got,) = converted(decode._fp8_to_half, words)
    wanted = np.vectorize(e4m3, otypes=[np.float64])(given)
    np.testing.assert_array_equal(256 * got.astype(float)[~np.isnan(wanted)], wanted[~np.isnan(wanted)])


def test_int4():
    check(decode._int4_to_halves, [lambda byte: (byte & 15) - 8, lambda byte: (byte >> 4) - 8])
