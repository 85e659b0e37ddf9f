"""Rotating components of keys, against explicit rotations, eigenvalues and expectations written out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import LAYERS, LENGTH, Layer, layers

from mla_compile.passes.rope_split import rotary_channels, split_rope

# Both sides compute in float64 on numbers of size one; eigenvectors and their inverse roots multiply the rounding of
# 1e-16 by some thousands.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROTARY = {name: layer for name, layer in LAYERS.items() if layer.pairs}


def channels(layer, biased=False):
    return rotary_channels(layer.site(), layer.weights(biased), layer.statistics())


def split_of(layer, components, own, biased=False):
    return split_rope(layer.site(), channels(layer, biased), components, own)


def turn(x, pairs, frequencies, places):
    """Rotate the pairs of ``[T, ..., D]`` by an angle per place."""
    x = x.clone()
    for (a, b), speed in zip(pairs, frequencies, strict=True):
        angle = (places * float(speed)).view(-1, *[1] * (x.dim() - 2))
        real, imaginary = x[..., a].clone(), x[..., b].clone()
        x[..., a] = real * angle.cos() - imaginary * angle.sin()
        x[..., b] = imaginary * angle.cos() + real * angle.sin()
    return x


def original_scores(layer, query, key, places):
    """``[H, T, T]`` scores of queries ``[T, H, D]`` and keys ``[T, n, D]``, each at its place."""
    rope = layer.rope()
    query, key = (turn(x, rope.pairs, rope.inv_freq, places) for x in (query, key))
    return torch.einsum("mhd,jhd->hmj", query, key.repeat_interleave(layer.heads // layer.kv_heads, 1))


def split_scores(layer, split, query, key, places):
    """The same through the maps: components that rotate, and a rest that does not."""
    count = len(split.inv_freq)
    pairs = [(i, i + count) for i in range(count)]
    moving = turn(torch.einsum("hed,mhd->mhe", split.query_rope, query), pairs, split.inv_freq, places)
    component = turn(key.flatten(1) @ split.key_rope.T, pairs, split.inv_freq, places)
    rest = (key.flatten(1) @ split.key_rest.T).unflatten(1, key.shape[1:])
    still = torch.einsum("hed,mhd->mhe", split.query_rest, query)
    return torch.einsum("mhe,je->hmj", moving, component) + torch.einsum(
        "mhd,jhd->hmj", still, rest.repeat_interleave(layer.heads // layer.kv_heads, 1)
    )


def operands(layer):
    return layer.draw(40, LENGTH, layer.heads, layer.dim), layer.draw(41, LENGTH, layer.kv_heads, layer.dim)


# ---- nothing lost


@pytest.mark.parametrize("name", [n for n in ROTARY if n != "narrow input"])
def test_all_components_leave_no_rest_and_reproduce_every_score(name):
    layer = ROTARY[name]
    count = layer.kv_heads * layer.pairs
    split = split_of(layer, count, count)
    turning = torch.tensor(layer.rope().pairs).flatten()
    rest = split.key_rest.unflatten(0, (layer.kv_heads, -1)).unflatten(2, (layer.kv_heads, -1))
    assert float(rest[:, turning].abs().max()) < 1e-9
    assert split.loss == pytest.approx(0.0, abs=1e-9)
    # At distances far beyond those that statistics know, before the key and behind it.
    places = torch.tensor([0.0, 1, 2, 5, 17, 100, 999, 12345, 77777], dtype=torch.float64)
    query, key = operands(layer)
    expected = original_scores(layer, query, key, places)
    torch.testing.assert_close(split_scores(layer, split, query, key, places), expected, **EXACT)


def test_all_components_of_keys_of_low_rank_lose_nothing_of_them():
    """Fewer inputs than key channels: components run out, and what real keys contain is carried."""
    layer = Layer(width=7)
    assert layer.width < 2 * layer.kv_heads * layer.pairs
    split = split_of(layer, layer.kv_heads * layer.pairs, layer.kv_heads * layer.pairs)
    query, _ = operands(layer)
    key = torch.einsum("bw,hdw->bhd", layer.draw(42, LENGTH, layer.width), layer.weights().key.weight)
    places = torch.arange(LENGTH, dtype=torch.float64)
    expected = original_scores(layer, query, key, places)
    torch.testing.assert_close(split_scores(layer, split, query, key, places), expected, **EXACT)


@given(layers(), st.data())
def test_components_of_their_own_frequency_are_exact_for_the_keys_they_hold(layer, data):
    """Keys in the span of what is kept score as before at any distance; the rest of them is zero."""
    count = layer.kv_heads * layer.pairs
    kept = data.draw(st.integers(0, count))
    split = split_of(layer, kept, kept)
    query, key = operands(layer)
    held = (key.flatten(1) @ (torch.eye(layer.kv_heads * layer.dim).double() - split.key_rest).T).unflatten(
        1, key.shape[1:]
    )
    places = torch.arange(LENGTH).double() * 7
    scale = 1 + float(held.abs().max())  # what is hardly ever looked at has long maps
    expected = original_scores(layer, query, held, places)
    # The maps divide by roots of what the loss says, which may differ by 1e6 between heads.
    torch.testing.assert_close(split_scores(layer, split, query, held, places), expected, rtol=1e-6, atol=1e-6 * scale)


# ---- nothing kept


@pytest.mark.parametrize("name", LAYERS)
def test_without_components_scores_are_their_mean_over_distances(name):
    """Least squares for one number instead of a rotation: the expectation of the score over the head's distances."""
    layer = LAYERS[name]
    split = split_of(layer, 0, 0)
    assert split.key_rope.shape[0] == split.query_rope.shape[1] == len(split.inv_freq) == 0
    torch.testing.assert_close(split.key_rest, torch.eye(layer.kv_heads * layer.dim).double(), **EXACT)
    query, key = operands(layer)
    got = split_scores(layer, split, query[:1], key[:1], torch.zeros(1).double())[:, 0, 0]
    places, rope = torch.arange(LENGTH).double(), layer.rope()
    away = turn(query[:1].expand(LENGTH, -1, -1), rope.pairs, rope.inv_freq, places)  # queries so far behind the key
    own = key[0].repeat_interleave(layer.heads // layer.kv_heads, 0)
    expected = torch.einsum("hm,mhd,hd->h", layer.statistics().distance, away, own)
    torch.testing.assert_close(got, expected, **EXACT)


def test_a_layer_without_rope_has_nothing_to_split():
    layer = LAYERS["no rope"]
    assert channels(layer).moment.shape == (0, 0)
    for components in (0, 3):
        split = split_of(layer, components, components)
        assert len(split.inv_freq) == 0
        assert split.loss == 0
        assert torch.equal(split.query_rest, torch.eye(layer.dim).double().expand(layer.heads, -1, -1))


def test_channels_that_do_not_rotate_stay_in_the_rest():
    layer = LAYERS["partial rotary"]
    still = [c for c in range(layer.dim) if c not in {c for pair in layer.rope().pairs for c in pair}]
    split = split_of(layer, 3, 2)
    rest = split.key_rest.unflatten(0, (layer.kv_heads, -1))[:, still].flatten(0, 1)
    columns = torch.tensor([h * layer.dim + c for h in range(layer.kv_heads) for c in still])
    assert torch.equal(rest, torch.eye(layer.kv_heads * layer.dim).double()[columns])
    assert torch.equal(split.query_rest[:, still], torch.eye(layer.dim).double()[still].expand(layer.heads, -1, -1))
    assert not split.query_rope[..., still].any()


# ---- the best choice


def by_frequency(layer):
    """Per frequency, the moment of its channels ``[n, n]`` and what a unit of their error costs ``[n]``."""
    found, group = channels(layer), layer.heads // layer.kv_heads
    price = found.energy * (1 - found.kept_still.abs().square())
    worth = price.unflatten(0, (layer.kv_heads, group)).sum(1)
    for pair in range(layer.pairs):
        own = torch.arange(layer.kv_heads) * layer.pairs + pair
        yield found.moment[own][:, own], worth[:, pair]


def left(moment, worth, encoder):
    """What the best linear reconstruction from ``encoder @ z`` leaves of ``sum_i worth_i |z_i|^2``."""
    known = encoder @ moment @ encoder.mH
    rest = moment - moment @ encoder.mH @ torch.linalg.solve(known, encoder @ moment)
    return float((worth * rest.diagonal().real).sum())


def lost(layer, components, own):
    """The loss as a share of what standing still altogether loses."""
    return split_of(layer, components, own).loss / split_of(layer, 0, 0).loss


rotating_layers = layers().filter(lambda layer: layer.pairs)


@given(rotating_layers, st.data())
def test_own_components_leave_the_smallest_eigenvalues_of_all_frequencies(layer, data):
    count = layer.kv_heads * layer.pairs
    kept = data.draw(st.integers(0, count))
    roots = [worth.sqrt()[:, None] * moment * worth.sqrt() for moment, worth in by_frequency(layer)]
    values = sorted((float(v) for root in roots for v in torch.linalg.eigvalsh(root)), reverse=True)
    assert lost(layer, kept, kept) == pytest.approx(sum(values[kept:]) / sum(values), rel=1e-6, abs=1e-9)


@given(rotating_layers, st.data())
def test_no_other_components_of_their_own_frequency_lose_less(layer, data):
    """Any other linear combinations of the heads' channels, real or complex, shared among frequencies in any way."""
    shares = [data.draw(st.integers(0, layer.kv_heads)) for _ in range(layer.pairs)]
    real, other = data.draw(st.booleans()), 0.0
    for salt, (share, (moment, worth)) in enumerate(zip(shares, by_frequency(layer), strict=True)):
        encoder = torch.complex(*layer.draw(60 + salt, 2, share, layer.kv_heads))
        other += left(moment, worth, encoder.real.to(encoder.dtype) if real else encoder)
    everything = sum(float((worth * moment.diagonal().real).sum()) for moment, worth in by_frequency(layer))
    assert lost(layer, sum(shares), sum(shares)) <= other / everything + 1e-9


# ---- the greedy choice, by brute force


def greedy(found, group, components, own, once):
    """Every step tries every target by a full eigendecomposition. Loss and targets, in the order of the choice."""

    def per_channel(x):
        return x.unflatten(0, (-1, group)).sum(1).flatten(0, 1)

    pairs, (count, _) = len(found.frequencies), found.moment.shape
    still, moved = 1 - found.kept_still.abs().square(), 1 - found.kept_at.abs().square()
    worth = per_channel(found.energy[:, :, None] * (still[:, :, None] - moved).clamp(min=0))
    home = (found.frequencies[torch.arange(count) % pairs][:, None] - found.targets).abs() < 1e-9
    moment, loss, targets = found.moment, 0.0, []
    for step in range(components):
        tried = []
        for target in range(len(found.targets)):
            if once and target in targets:
                continue
            scale = (worth[:, target] * (home[:, target] if step < own else 1)).sqrt()
            value, vector = (x[..., -1] for x in torch.linalg.eigh(scale[:, None] * moment * scale))
            tried.append((float(value), target, vector, scale))
        value, target, vector, scale = max(tried, key=lambda t: t[0])
        inverse = torch.where(scale > 1e-6 * scale.max(), 1 / scale.clamp(min=1e-300), 0.0)
        encoder, decoder = vector.conj() * scale, vector * inverse
        price = per_channel(found.energy * moved[:, :, target])
        loss += float((price * decoder.abs().square()).sum()) * value
        removal = torch.eye(count) - torch.outer(decoder, encoder)
        moment = removal @ moment @ removal.mH
        targets.append(target)
    return loss + float((per_channel(found.energy * still) * moment.diagonal().real).sum()), targets


@given(rotating_layers, st.data())
def test_choice_is_that_of_trying_everything(layer, data):
    found = channels(layer)
    components = data.draw(st.integers(1, max(1, len(found.moment) * 3 // 4)))
    own = data.draw(st.integers(0, components))
    split = split_rope(layer.site(), found, components, own)
    loss, targets = greedy(found, layer.heads // layer.kv_heads, components, own, once=False)
    # Eigenvectors are exact to 1e-10, and where two targets are worth the same to 1e-6 either may be taken.
    assert split.loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(split.inv_freq, found.targets[targets], rtol=1e-12, atol=0)
    assert all(split.own[:own])


@given(rotating_layers, st.lists(st.floats(0.05, 1.5), max_size=3), st.data())
def test_choice_of_one_component_per_target_is_that_of_trying_everything(layer, others, data):
    """Targets of a table that has some of the layer's frequencies and some that are none of it, in any order."""
    kept = data.draw(st.lists(st.sampled_from(layer.rope().inv_freq), max_size=3, unique=True))
    table = data.draw(st.permutations([*kept, *others]).filter(bool))
    found = channels(layer).aimed_at(torch.tensor(table, dtype=torch.float64))
    own = data.draw(st.integers(0, len(kept)))
    split = split_rope(layer.site(), found, len(table), own, once=True)
    loss, _ = greedy(found, layer.heads // layer.kv_heads, len(table), own, once=True)
    assert split.inv_freq.tolist() == table
    assert split.loss == pytest.approx(loss, rel=1e-6, abs=1e-9 * split_of(layer, 0, 0).loss)


def test_one_component_per_frequency_of_one_key_head_is_exact():
    layer = LAYERS["one key head"]
    table = sorted(layer.rope().inv_freq)
    found = channels(layer).aimed_at(torch.tensor(table, dtype=torch.float64))
    split = split_rope(layer.site(), found, len(table), len(table), once=True)
    query, key = operands(layer)
    places = torch.arange(LENGTH, dtype=torch.float64) * 11
    expected = original_scores(layer, query, key, places)
    torch.testing.assert_close(split_scores(layer, split, query, key, places), expected, **EXACT)
    assert split.inv_freq.tolist() == table
    assert all(split.own)


def test_pairs_of_one_frequency_are_mixed_like_heads():
    """Two pairs of a head that rotate alike are one isotypic component (T1): both fit one component if parallel."""

    class Twice(Layer):
        def rope(self):
            rope = super().rope()
            return type(rope)(rope.pairs, (0.5,) * len(rope.pairs))

    layer = Twice(kv_heads=1, heads=1, dim=4, pairs=2)
    found = channels(layer)
    parallel = torch.ones(2, 2, dtype=found.moment.dtype)
    assert split_rope(layer.site(), replace(found, moment=parallel), 1, 1).loss == pytest.approx(0.0, abs=1e-9)


# ---- the expected loss


def expected_loss(layer, split):
    """Second-order loss in nats per token, the expectation over keys and distances written out.

    Queries are independent of keys and distances, their pairs of each other and of any direction (as the statistics
    are read): an error ``e`` of a head's complex keys then costs ``1/2 scale^2 1/2 sum_l E f |q_l|^2 E |e_l|^2``.
    """
    statistics, rope, site = layer.statistics(), layer.rope(), layer.site()
    first, second = torch.tensor(rope.pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    moment = torch.einsum("gdw,wv,hev->gdhe", layer.weights().key.weight, statistics.moment, layer.weights().key.weight)
    moment = moment.flatten(2).flatten(0, 1)  # of all key channels, real
    count, total = len(split.inv_freq), 0.0
    components = [(i, i + count) for i in range(count)]
    for head in range(layer.heads):
        own = head // (layer.heads // layer.kv_heads)
        for distance in range(LENGTH):
            place = torch.tensor([float(distance)], dtype=torch.float64)
            # Scores are bilinear: turn basis queries so far, and read off what they meet in the keys.
            basis = torch.eye(layer.dim).double()
            here = turn(basis[None], rope.pairs, rope.inv_freq, place)[0]
            exact = torch.zeros(layer.dim, layer.kv_heads, layer.dim).double()
            exact[:, own] = here
            moving = turn((basis @ split.query_rope[head].T)[None], components, split.inv_freq, place)[0]
            rest = split.key_rest.unflatten(0, (layer.kv_heads, -1))[own]
            approximate = moving @ split.key_rope + basis @ split.query_rest[head].T @ rest
            error = exact.flatten(1) - approximate
            cost = (error @ moment @ error.T).diagonal()
            squares = statistics.query[head].diagonal()
            for a, b in zip(first.tolist(), second.tolist(), strict=True):
                # A query pair of random direction has half of its square in either channel.
                energy = squares[a] + squares[b]
                total += float(statistics.distance[head, distance] * energy * (cost[a] + cost[b]) / 2)
    return site.scale**2 * total / 2


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize(("components", "own"), [(0, 0), (1, 1), (2, 2), (1, 0), (3, 2)])
def test_loss_is_proportional_to_the_expected_loss(name, components, own):
    """All of their own frequency, or one at most that takes along others: errors of several such may add up."""
    layer = ROTARY[name]
    expected = [expected_loss(layer, split_of(layer, *sizes)) for sizes in ((components, own), (0, 0))]
    assert lost(layer, components, own) == pytest.approx(expected[0] / expected[1], rel=1e-9)


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("components", [2, 4])
def test_loss_of_many_that_take_along_others_is_nearly_the_expected_loss(name, components):
    """What a component takes along of a channel may go with what another one does: the sum leaves that out."""
    layer = ROTARY[name]
    expected = [expected_loss(layer, split_of(layer, count, 0)) for count in (components, 0)]
    # Measured on these layers: 7 % at most, where nearly everything is carried; 2 % otherwise.
    assert lost(layer, components, 0) == pytest.approx(expected[0] / expected[1], rel=0.1)


def test_loss_is_in_nats_per_token():
    layer = LAYERS["grouped"]
    split = split_of(layer, 2, 2)
    assert split.loss == pytest.approx(expected_loss(layer, split), rel=1e-9)


def test_taking_along_other_frequencies_helps_where_they_are_close():
    """Frequencies a hundredth apart: one component carries all of them for a head that looks back a few tokens."""

    class Close(Layer):
        def rope(self):
            rope = super().rope()
            return type(rope)(rope.pairs, tuple(0.9 + 0.01 * i for i in range(len(rope.pairs))))

    layer = Close(kv_heads=1)
    alone, together = (split_of(layer, 2, own) for own in (2, 0))
    assert together.loss < 0.6 * alone.loss
    assert expected_loss(layer, together) < 0.6 * expected_loss(layer, alone)


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_further_component_lowers_the_loss(name, share):
    layer = ROTARY[name]
    losses = [
        split_of(layer, count, math.ceil(share * count)).loss for count in range(layer.kv_heads * layer.pairs + 1)
    ]
    if share in (0.0, 1.0):  # otherwise the first ones are not the same
        assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_biases_of_keys_that_rotate_count():
    """A bias is part of every key, and what stands still for it is as wrong."""
    layer = Layer(seed=3)
    found, weights = channels(layer, biased=True), layer.weights()
    first, second = torch.tensor(layer.rope().pairs).unbind(1)
    statistics = layer.statistics()
    rows, bias = weights.key.weight.flatten(0, 1), weights.key.bias.flatten()
    mean = rows @ statistics.mean
    moment = rows @ statistics.moment @ rows.T + torch.outer(mean, bias) + torch.outer(bias, mean + bias)
    moment = moment.unflatten(0, (layer.kv_heads, -1)).unflatten(2, (layer.kv_heads, -1))
    real = moment[:, first][..., first] + moment[:, second][..., second]
    imaginary = moment[:, second][..., first] - moment[:, first][..., second]
    expected = torch.complex(real, imaginary).flatten(2).flatten(0, 1)
    torch.testing.assert_close(found.moment, expected, **EXACT)


def test_a_layer_that_the_loss_does_not_see_can_be_split():
    """A block whose output projection is still zero (LLaMA Pro's new blocks): no gradient, no distances."""
    layer = Layer()
    statistics = layer.statistics()
    unseen = replace(statistics, query=0 * statistics.query, distance=0 * statistics.distance)
    found = rotary_channels(layer.site(), layer.weights(), unseen)
    split = split_rope(layer.site(), found, 2, 1)
    assert split.loss == 0
    assert all(x.isfinite().all() for x in (split.key_rope, split.key_rest, split.query_rope, split.query_rest))


def test_a_layer_that_the_loss_does_not_see_rotates_as_it_did():
    """Nothing tells components apart, but as many as there are keep every score."""
    layer = Layer()
    unseen = replace(layer.statistics(), query=0 * layer.statistics().query)
    count = layer.kv_heads * layer.pairs
    split = split_rope(layer.site(), rotary_channels(layer.site(), layer.weights(), unseen), count, count // 2)
    assert all(split.own)
    turning = torch.tensor(layer.rope().pairs).flatten()
    rest = split.key_rest.unflatten(0, (layer.kv_heads, -1))
    assert float(rest[:, turning].abs().max()) < 1e-9
