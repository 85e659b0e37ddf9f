"""The exact facts that the methods stand on (T1 to T9), in float64, each where the code makes use of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from conversion import difference
from hypothesis import given
from hypothesis import strategies as st
from layers import LAYERS, LENGTH, Layer, layers

from mla_compile.config import make_config
from mla_compile.passes.activations import attend_site
from mla_compile.passes.factorise import factorise_mha2mla
from mla_compile.passes.fisher import assemble, joint_factors
from mla_compile.passes.rope_split import rotary_channels, split_rope
from mla_compile.passes.weights import read_site
from mla_compile.plan import plan_layers

# Both sides compute in float64 on numbers of size one; solving with random matrices multiplies the rounding of 1e-16.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
FREQUENCIES = torch.tensor([0.9, 0.31, 0.07], dtype=torch.float64)
PLACES = [(5, 3), (100, 7), (4000, 1), (2, 2)]


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complex_random(seed, *shape):
    return torch.complex(random(seed, *shape), random(seed + 1, *shape))


def turned(z, place):
    """Complex channels ``[..., P]`` at a place."""
    return z * torch.polar(torch.ones(len(FREQUENCIES)).double(), place * FREQUENCIES)


def score(query, key, m, j):
    return (turned(query, m).conj() * turned(key, j)).real.sum(-1)


# ---- T1: which maps commute with rotations


@given(st.integers(1, 4), st.integers(0, 2**16))
def test_t1_any_complex_mixture_of_heads_per_frequency_keeps_all_scores(heads, seed):
    """``k' = G k`` and ``conj(q') = conj(q) G^-1`` with one invertible complex matrix per frequency."""
    key, query = complex_random(seed, heads, 3), complex_random(seed + 2, heads, 3)
    mix = complex_random(seed + 4, 3, heads, heads) + 3 * torch.eye(heads)
    mixed = torch.einsum("lcg,gl->cl", mix, key)
    spread = torch.einsum("il,lic->icl", query.conj(), torch.linalg.inv(mix)).conj()
    for m, j in PLACES:
        expected = score(query, key, m, j)
        # The inverse of a random matrix may be some thousands.
        torch.testing.assert_close(score(spread, mixed, m, j).sum(1), expected, rtol=1e-7, atol=1e-7)


def test_t1_mixtures_of_frequencies_do_not():
    """The same with frequencies in place of heads is exact at one distance only."""
    key, query = complex_random(0, 3), complex_random(2, 3)
    mix = torch.linalg.qr(complex_random(4, 3, 3))[0]
    mixed, spread = mix @ key, (query.conj() @ mix.mH).conj()
    torch.testing.assert_close(score(spread, mixed, 9, 9), score(query, key, 9, 9), **EXACT)
    assert abs(float(score(spread, mixed, 9, 2) - score(query, key, 9, 2))) > 0.1


# ---- T2: complex combinations are at least as good as real ones


@given(st.integers(2, 6), st.integers(0, 2**16))
def test_t2_complex_components_hold_at_least_as_much_as_real_ones(heads, seed):
    """Ky Fan: sums of largest eigenvalues of a Hermitian matrix exceed those of its real part."""
    root = complex_random(seed, heads, heads + 1)
    moment = root @ root.mH
    whole, real = (torch.linalg.eigvalsh(x).flip(0).cumsum(0) for x in (moment, moment.real))
    assert (whole >= real - 1e-9 * real[-1]).all()
    assert float(whole[-1]) == pytest.approx(float(real[-1]))


def test_t2_components_of_a_layer_hold_more_than_real_ones():
    """Where keys of two heads are each other turned by a quarter, one complex component holds both."""
    layer = Layer(pairs=1, dim=2, heads=2)
    weights, statistics = layer.weights(False), layer.statistics()
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    weights.key.weight[1] = quarter @ weights.key.weight[0]
    found = rotary_channels(layer.site(), weights, statistics)
    split = split_rope(layer.site(), found, 1, 1)
    assert split.loss < 1e-9 * split_rope(layer.site(), found, 0, 0).loss
    weighted = found.moment.real * torch.sqrt(torch.outer(*[found.energy[:, 0]] * 2))
    assert torch.linalg.eigvalsh(weighted)[0] > 0.1 * weighted.trace(), "no real component does"


# ---- T3: components are weighed by the queries that look at them


def test_t3_a_head_that_no_query_looks_at_is_not_held():
    """One component of two heads' keys of equal size goes to the head that is looked at."""
    layer = Layer(pairs=1, dim=2, heads=2)
    site, weights, statistics = layer.site(), layer.weights(False), layer.statistics()
    statistics.query[1] *= 1e-8
    split = split_rope(site, rotary_channels(site, weights, statistics), 1, 1)
    assert float(split.key_rope[:, 2:].norm()) < 1e-2 * float(split.key_rope[:, :2].norm())
    assert float(split.key_rest[:2].norm()) < 1e-2 * float(split.key_rest[2:].norm())


# ---- T4: what standing still costs


@given(st.lists(st.floats(0, 1), min_size=3, max_size=12).filter(lambda p: sum(p) > 0.1), st.floats(0.0, 3.0))
def test_t4_price_of_standing_still(shares, frequency):
    """``E |exp(-i D f) - 1|^2 = 2 - 2 Re a``, and at best, with ``a`` folded into the query, ``1 - |a|^2``."""
    share = torch.tensor(shares, dtype=torch.float64) / sum(shares)
    turn = torch.polar(torch.ones(len(share)).double(), -torch.arange(len(share)).double() * frequency)
    a = (share * turn).sum()
    assert float((share * (turn - 1).abs().square()).sum()) == pytest.approx(float(2 - 2 * a.real), abs=1e-12)
    best = float((share * (turn - a).abs().square()).sum())
    assert best == pytest.approx(float(1 - a.abs().square()), abs=1e-12)
    for other in (a + 0.1, a - 0.1j, a * 0.9, torch.ones(())):
        assert best <= float((share * (turn - other).abs().square()).sum()) + 1e-12


@pytest.mark.parametrize("name", [n for n, layer in LAYERS.items() if layer.pairs])
def test_t4_is_the_price_of_a_layer(name):
    layer = LAYERS[name]
    found = rotary_channels(layer.site(), layer.weights(), layer.statistics())
    away = torch.arange(LENGTH)[:, None] * torch.tensor(layer.rope().inv_freq, dtype=torch.float64)
    share = layer.statistics().distance[:, :, None]
    torch.testing.assert_close(found.kept_still.real, (share * away.cos()).sum(1), **EXACT)
    torch.testing.assert_close(found.kept_still.imag, -(share * away.sin()).sum(1), **EXACT)
    torch.testing.assert_close(found.kept_at.diagonal(dim1=1, dim2=2), torch.ones_like(found.kept_still), **EXACT)


def test_t4_slow_pairs_are_almost_free():
    """Whether a pair turns by a hundredth of a degree per position makes no difference to nearby tokens."""
    layer = Layer(pairs=2)
    found = rotary_channels(layer.site(), layer.weights(), layer.statistics())
    slow = replace(found, kept_still=torch.polar(1 - 1e-9 + 0 * found.energy, 0 * found.energy))
    losses = [split_rope(layer.site(), x, 0, 0).loss for x in (found, slow)]
    assert losses[1] < 1e-6 * losses[0]


# ---- T5: biases


@pytest.mark.parametrize("exception", [{}, {"softcap": 2.0}, {"sinks": True}], ids=["plain", "soft-cap", "sinks"])
def test_t5_biases_of_keys_that_stand_still_are_dropped_where_softmax_does_not_see_them(exception):
    layer = Layer(pairs=0, **exception)
    site, (query, key, value) = layer.site(), layer.operands(layer.inputs())
    with_bias = attend_site(site, query, key, value).output
    without = attend_site(site, query, key - layer.weights().key.bias, value).output
    assert (difference(without, with_bias) > 1e-3) == site.key_bias_matters == bool(exception)
    if not exception:
        torch.testing.assert_close(without, with_bias, **EXACT)


@pytest.mark.parametrize("exception", [{}, {"softcap": 2.0}, {"sinks": True}], ids=["plain", "soft-cap", "sinks"])
def test_t5_biases_of_values_move_behind_attention_where_weights_sum_to_one(exception):
    layer = Layer(**exception)
    site, (query, key, value) = layer.site(), layer.operands(layer.inputs())
    bias = layer.weights().value.bias
    with_bias = attend_site(site, query, key, value).output
    moved = attend_site(site, query, key, value - bias).output + bias.repeat_interleave(2, 0)
    assert (difference(moved, with_bias) > 1e-3) == site.value_bias_matters == ("sinks" in exception)
    if not site.value_bias_matters:
        torch.testing.assert_close(moved, with_bias, **EXACT)


def test_t5_biases_of_keys_that_rotate_must_stay():
    layer = Layer()
    query, key, value = layer.operands(layer.inputs())
    with_bias = attend_site(layer.site(), query, key, value).output
    assert difference(attend_site(layer.site(), query, key - layer.weights().key.bias, value).output, with_bias) > 1e-2


# ---- T6: a norm of keys is one number per token and norm


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("normed keys", "key"),
        ("normed keys and values", "key"),
        ("wide norm behind the rotation", "key"),
        ("gains behind the rotation", "key"),
        ("normed keys and values", "value"),
        ("centred values", "value"),
    ],
)
def test_t6_what_is_normed_is_linear_but_for_one_number(mixed, name, role):
    """Weights as read, times the inverse norm, are the heads that the model makes: gain and centring are in them."""
    index = list(zoo.MIXED).index(name)
    site = mixed.sites[index]
    ids = torch.randint(0, zoo.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    seen, weights = mixed.look(ids)[index], getattr(read_site(mixed.program, site), role)
    linear = torch.einsum("bsw,hdw->bshd", seen.source.double(), weights.weight) + weights.bias
    heads = getattr(seen, role).double() - weights.shift
    number = (heads * linear).sum(-1) / linear.square().sum(-1)
    # Activations are float32.
    assert difference(linear * number[..., None], heads) < 1e-5
    assert (number > 0).all()
    assert number.std() > 1e-3, "a constant would need no norm"
    projection = getattr(site, role)
    assert len(projection.norm.groups) == (1 if name.startswith("wide") else projection.heads)
    if len(projection.norm.groups) == 1:
        assert difference(number, number[..., :1].expand_as(number)) < 1e-5


def test_t6_mixtures_of_heads_are_exact_behind_a_norm_of_all():
    """Rotary components of linear keys, times the number, score as the normed keys do."""
    key, query, number = complex_random(0, 4, 3), complex_random(2, 4, 3), 0.37
    mix = complex_random(4, 3, 4, 4)
    mixed = torch.einsum("lcg,gl->cl", mix, key)
    spread = torch.einsum("il,lic->icl", query.conj(), torch.linalg.inv(mix)).conj()
    for m, j in PLACES:
        torch.testing.assert_close(
            number * score(spread, mixed, m, j).sum(1), score(query, number * key, m, j), rtol=1e-7, atol=1e-7
        )


# ---- T7: the best low rank between two metrics


@given(st.integers(1, 8), st.integers(0, 2**16))
def test_t7_any_square_root_gives_the_same_factors(rank, seed):
    """Truncated SVD between two roots: Cholesky or symmetric, the product is the same and the error its tail."""
    matrix, roots = random(seed, 9, 8), [random(seed + i, n, 2 * n) for i, n in ((1, 9), (2, 8))]
    left, right = (root @ root.T for root in roots)
    products = []
    for take in (torch.linalg.cholesky, symmetric_root):
        a, b = take(left).mT, take(right)
        u, s, v = torch.linalg.svd(a @ matrix @ b, full_matrices=False)
        close = torch.linalg.solve(a, (u[:, :rank] * s[:rank]) @ v[:rank]) @ torch.linalg.inv(b)
        error = matrix - close
        # Condition numbers of the roots are some tens.
        assert float((left @ error @ right @ error.T).trace()) == pytest.approx(
            float(s[rank:].square().sum()), rel=1e-8, abs=1e-8
        )
        products.append(close)
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-5)


def symmetric_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_t7_factors_of_a_layer_are_the_truncated_svd_between_two_roots(rank):
    """By Cholesky factors, where the code takes symmetric roots and eigenvectors."""
    layer = LAYERS["grouped"]
    site, weights, statistics = layer.site(), layer.weights(), layer.statistics()
    split = split_rope(site, rotary_channels(site, weights, statistics), 2, 2)
    factors = joint_factors(site, weights, statistics, split)
    rows = torch.cat([split.key_rest @ weights.key.weight.flatten(0, 1), weights.value.weight.flatten(0, 1)])
    query = split.query_rest @ statistics.query @ split.query_rest.mT * site.scale**2
    output = statistics.output * statistics.attended[:, None, None]
    blocks = [m.unflatten(0, (layer.kv_heads, -1)).sum(1) for m in (query, output)]
    a = torch.linalg.cholesky(torch.block_diag(*blocks[0], *blocks[1])).mT
    b = torch.linalg.cholesky(statistics.moment - torch.outer(statistics.mean, statistics.mean))
    u, s, v = torch.linalg.svd(a @ rows @ b, full_matrices=False)
    expected = torch.linalg.solve(a, (u[:, :rank] * s[:rank]) @ v[:rank]) @ torch.linalg.inv(b)
    got = torch.cat([factors.key_up.flatten(0, 1), factors.value_up.flatten(0, 1)])[:, :rank] @ factors.down[:rank]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(factors.loss[:rank], s[:rank].square() / 2, rtol=1e-8, atol=1e-10)


# ---- T8: the lossless point


@pytest.mark.parametrize("method", ["mha2mla", "fisher"])
def test_t8_heads_without_rope_lose_nothing_at_the_rank_of_the_width(method):
    """As many key and value channels as inputs each: half the cache, and the same outputs."""
    layer = Layer(heads=4, kv_heads=4, dim=6, v_dim=6, width=24, pairs=0)
    site, weights = layer.site(), layer.weights()
    if method == "fisher":
        split = split_rope(site, rotary_channels(site, weights, layer.statistics()), 0, 0)
        factors = joint_factors(site, weights, layer.statistics(), split)
        ranks = {rank: assemble(site, weights, split, factors, rank) for rank in (24, 23)}
    else:
        ranks = {}
        for rank in (24, 23):
            config = make_config(kv_rank=rank, rope_dims=0, svd="joint", selection="uniform")
            (plan,) = plan_layers([site], [layer.width], config)
            ranks[rank] = factorise_mha2mla(site, weights, plan, config, None)
    x = layer.inputs()
    assert site.elements_per_token == 2 * ranks[24].row_width(site)
    torch.testing.assert_close(layer.attend_latent(ranks[24], x), layer.attend(x), **EXACT)
    assert difference(layer.attend_latent(ranks[23], x), layer.attend(x)) > 1e-4


# ---- T9: other rotations


@given(layers(), st.integers(1, 9))
def test_t9_channels_that_do_not_rotate_are_exact_without_rope(layer, seed):
    """Wherever the pairs lie: with all of them held, scores are the original's, and only pairs take components."""
    layer = replace(layer, width=layer.width + 3, seed=seed)  # wide enough that pairs are of full rank
    count = layer.kv_heads * layer.pairs
    site, weights, statistics = layer.site(), layer.weights(), layer.statistics()
    split = split_rope(site, rotary_channels(site, weights, statistics), count, count)
    factors = joint_factors(site, weights, statistics, split)
    latent = assemble(site, weights, split, factors, len(factors.loss))
    x = layer.inputs()
    assert latent.inv_freq.shape[1] == count
    # Directions that the loss hardly sees are divided by small numbers.
    torch.testing.assert_close(layer.attend_latent(latent, x), layer.attend(x), rtol=1e-5, atol=1e-5)
