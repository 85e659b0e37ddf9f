"""Generation with a decoder whose next token is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_compile.errors import UsageError, VerificationError
from mla_compile.runtime.generate import Sampling, generate

VOCABULARY = 7
MASS = np.array([0.4, 0.24, 0.16, 0.1, 0.06, 0.03, 0.01])


class Scripted:
    """Answers every token with given logits, and writes down what it was asked."""

    known_tokens = vocabulary = VOCABULARY

    def __init__(self, logits):
        self.logits = logits
        self.calls = []

    def empty_cache(self, batch, tokens):
        return ("empty", batch, tokens)

    def step(self, ids, attention_mask, position_ids, cache):
        assert ids.dtype == attention_mask.dtype == position_ids.dtype == np.int64
        self.calls.append((ids.tolist(), attention_mask.tolist(), position_ids.tolist(), cache))
        return np.stack([[self.logits(token) for token in row] for row in ids]), len(self.calls)


def successor(token):
    """The next token is certain: one more, around the vocabulary."""
    return 9.0 * np.eye(VOCABULARY, dtype=np.float32)[(token + 1) % VOCABULARY]


def fixed(_):
    return np.log(MASS).astype(np.float32)


def frequencies(sampling, count=4000):
    """How often every token is chosen first, over many equal prompts."""
    chosen = [row[0] for row in generate(Scripted(fixed), [[0]] * count, 1, sampling=sampling)]
    return np.bincount(chosen, minlength=VOCABULARY) / count


def assert_drawn_from(found, expected, count=4000):
    # A frequency has a standard deviation of sqrt(p (1 - p) / n); five of them leave no room for chance.
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count))


def test_greedy_takes_the_most_likely_token():
    assert generate(Scripted(successor), [[3], [1, 5]], 4) == [[4, 5, 6, 0], [6, 0, 1, 2]]


def test_prompts_are_padded_on_the_left_and_counted_from_their_own_start():
    decoder = Scripted(successor)
    generate(decoder, [[1, 2, 3], [4]], 3)
    assert decoder.calls == [
        ([[1, 2, 3], [0, 0, 4]], [[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [0, 0, 0]], ("empty", 2, 5)),
        ([[4], [5]], [[1, 1, 1, 1], [0, 0, 1, 1]], [[3], [1]], 1),
        ([[5], [6]], [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [[4], [2]], 2),
    ]


def test_stop_token_ends_its_own_sequence_only():
    decoder = Scripted(successor)
    assert generate(decoder, [[3], [0]], 5, stop=[5, 99]) == [[4], [1, 2, 3, 4]]
    assert len(decoder.calls) == 5  # the step that finds the last stop token is the last


def test_several_stop_tokens():
    assert generate(Scripted(successor), [[3], [0]], 9, stop=(5, 2)) == [[4], [1]]


def test_tokens_are_streamed_as_they_come():
    seen = []
    found = generate(Scripted(successor), [[3], [0]], 9, stop=[5, 3], on_tokens=seen.append)
    assert seen == [[4, 1], [None, 2], [None, None]]
    assert [[row[i] for row in seen if row[i] is not None] for i in range(2)] == found


def test_no_new_tokens():
    decoder = Scripted(successor)
    assert generate(decoder, [[3], [1, 2]], 0) == [[], []]
    assert not decoder.calls


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_array_with_a_mask_is_the_prompts_within_it(side):
    rows, real = np.array([[1, 2, 3], [4, 6, 6]]), np.array([[1, 1, 1], [1, 0, 0]])
    if side == "left":
        rows[1], real[1] = rows[1, ::-1], real[1, ::-1]
    masked, plain = Scripted(successor), Scripted(successor)
    found = generate(masked, rows, 3, attention_mask=real)
    assert found == generate(plain, [[1, 2, 3], [4]], 3)
    assert masked.calls == plain.calls


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompt_is_an_error(prompts):
    with pytest.raises(UsageError, match="at least one token"):
        generate(Scripted(successor), prompts, 1)


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ([1, 2, 3], {}, "Prompt 0 is no list of token ids.*a list of token ids for every sequence"),
        ([[1], [1.7, 2]], {}, "Prompt 1 is no list of token ids"),
        ([[1], [[2, 3], [4]]], {}, "Prompt 1 is no list of token ids"),
        ("words", {}, "Prompt 0 is no list of token ids"),
        (7, {}, "There is no prompt"),
        ([[1, 2]], {"attention_mask": np.ones((1, 3))}, "The mask is not of the 1 prompts"),
        ([[1, 2]], {"attention_mask": np.ones((2, 2))}, "The mask is not of the 1 prompts"),
        ([[1, 2]], {"attention_mask": 1}, "The mask is not of the 1 prompts"),
        ([[1, 2]], {"attention_mask": np.zeros((1, 2))}, "at least one token"),
        ([[1]], {"stop": 3}, "The tokens to stop at are 3.*a list of token ids"),
        ([[1]], {"stop": ["end"]}, "The tokens to stop at are"),
        ([[1]], {"max_new_tokens": -4}, "max_new_tokens is -4"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_told(prompts, settings, said):
    with pytest.raises(UsageError, match=said):
        generate(Scripted(successor), prompts, **{"max_new_tokens": 2, **settings})


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_prompts_and_stops_of_any_kind(kind):
    assert generate(Scripted(successor), kind([[3, 4]]), 4, stop=kind([6])) == [[5]]
    assert generate(Scripted(successor), [kind([3, 4])], 4, stop={6}) == [[5]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_flattens(temperature):
    expected = MASS ** (1 / temperature)
    assert_drawn_from(frequencies(Sampling(temperature)), expected / expected.sum())


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_keeps_the_k_most_likely(top_k):
    expected = np.where(np.arange(VOCABULARY) < top_k, MASS, 0)
    assert_drawn_from(frequencies(Sampling(1.0, top_k=top_k)), expected / expected.sum())


@pytest.mark.parametrize("top_k", [0, VOCABULARY, 100])
def test_top_k_of_all_changes_nothing(top_k):
    assert_drawn_from(frequencies(Sampling(1.0, top_k=top_k)), MASS)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, 1), (1e-9, 1), (0.39, 1), (0.41, 2), (0.63, 2), (0.65, 3), (0.98, 6), (1.0, 7)]
)
def test_top_p_keeps_the_fewest_tokens_of_that_mass(top_p, kept):
    """Mass of the first tokens: 0.4, 0.64, 0.8, ...; even a mass of nothing leaves the most likely token."""
    expected = np.where(np.arange(VOCABULARY) < kept, MASS, 0)
    assert_drawn_from(frequencies(Sampling(1.0, top_p=top_p)), expected / expected.sum())


def test_top_p_does_not_depend_on_the_order_of_the_vocabulary():
    order = np.array([6, 2, 0, 5, 1, 4, 3])
    decoder = Scripted(lambda _: np.log(MASS[order]))
    chosen = {row[0] for row in generate(decoder, [[0]] * 500, 1, sampling=Sampling(1.0, top_p=0.65))}
    assert {int(order[token]) for token in chosen} == {0, 1, 2}


def test_equal_seeds_give_equal_texts():
    def sample(seed):
        return generate(Scripted(fixed), [[0], [1, 2]], 40, sampling=Sampling(1.0, seed=seed))

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_large_logits_do_not_overflow():
    decoder = Scripted(lambda token: 1e4 * successor(token))
    assert generate(decoder, [[2]], 3, sampling=Sampling(0.1)) == [[3, 4, 5]]


def test_a_sequence_ends_where_it_is_told_to():
    """The last token counts, and the others go on."""
    asked = []

    def until(row, tokens):
        asked.append((row, list(tokens)))
        return tokens[-1] == 5

    assert generate(Scripted(successor), [[3], [5]], 4, until=until) == [[4, 5], [6, 0, 1, 2]]
    assert asked[:4] == [(0, [4]), (1, [6]), (0, [4, 5]), (1, [6, 0])]
    assert all(row == 1 for row, _ in asked[4:])


@pytest.mark.parametrize("temperature", [np.nan, -1.0])
def test_a_temperature_is_a_number(temperature):
    with pytest.raises(UsageError, match="The temperature is"):
        Sampling(temperature)


def test_an_infinite_temperature_chooses_among_what_can_be_read():
    decoder = Scripted(fixed)
    decoder.known_tokens = 2
    found = generate(decoder, [[0]] * 200, 1, sampling=Sampling(np.inf))
    assert {token for (token,) in found} == {0, 1}


def test_logits_that_rule_out_every_token_are_told():
    logits = np.full(3, -np.inf)
    with pytest.raises(VerificationError, match="not numbers"):
        generate(Scripted(lambda _: logits), [[1]], 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_told(temperature, wrong):
    """NaN would be taken for the most likely token: the first, which ends the text where that is the end token."""
    logits = np.where(np.arange(VOCABULARY) == 2, wrong, 0.0).astype(np.float32)
    with pytest.raises(VerificationError, match="are not numbers"):
        generate(Scripted(lambda _: logits), [[1]], 2, sampling=Sampling(temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_cannot_be_read_is_chosen_only_to_end_a_sequence(temperature):
    """A head that is wider than the table; what follows the end of one sequence is nobody's text, but is run."""

    def logits(token):
        wanted = {4: 6, 1: 5}.get(token, token + 1)
        return (50.0 * np.eye(VOCABULARY)[wanted] + 40.0 * np.eye(VOCABULARY)[0]).astype(np.float32)

    decoder = Scripted(logits)
    decoder.known_tokens = 5
    found = generate(decoder, [[3], [1]], 3, stop=[6, 99], sampling=Sampling(temperature))
    assert found == [[4], [0, 1, 0]]
    assert [call[0] for call in decoder.calls] == [[[3], [1]], [[4], [0]], [[0], [1]]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": np.nan}, "temperature is nan"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": np.nan}, "top_p is nan"),
        ({"top_p": -0.1}, r"top_p is -0\.1"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_sampling_out_of_range_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        Sampling(**settings)


def test_a_token_may_be_ruled_out():
    logits = np.where(np.arange(VOCABULARY) == 2, 0.0, -np.inf).astype(np.float32)
    assert generate(Scripted(lambda _: logits), [[1]], 2, sampling=Sampling(1.0)) == [[2, 2]]
