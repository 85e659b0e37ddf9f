"""Layers side by side: in order, each by one thread, a few at a time, and to the bits that one after another has."""

from __future__ import annotations

import threading

import models
import pytest
import torch

from mla_compile import api
from mla_compile.errors import UsageError
from mla_compile.passes.parallel import parallel_map


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("jobs", [1, 2, 3, 9])
def test_results_come_in_order(jobs):
    done = threading.Event()

    def make(item):
        if jobs > 1 and item == 0:
            assert done.wait(60)  # the first waits for the second, which is begun beside it
        elif item == 1:
            done.set()
        return item**2

    assert [*parallel_map(make, range(7), jobs)] == [item**2 for item in range(7)]


def test_no_more_than_the_jobs_are_begun_before_one_is_taken():
    begun = []
    found = parallel_map(lambda item: begun.append(item) or item, range(10), 3)
    for taken in range(10):
        assert next(found) == taken
        assert len(begun) <= taken + 3


def test_every_job_has_one_thread_and_the_caller_gets_its_own_back(two_threads):
    with torch.no_grad():
        seen = [*parallel_map(lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), range(4), 2)]
    assert seen == [(1, False)] * 4
    assert torch.get_num_threads() == 2
    assert [*parallel_map(lambda _: torch.get_num_threads(), range(2), 1)] == [2, 2]


def test_what_goes_wrong_in_one_ends_all(two_threads):
    begun = []

    def make(item):
        begun.append(item)
        if item == 1:
            raise ValueError("layer 1")
        return item

    with pytest.raises(ValueError, match="layer 1"):
        list(parallel_map(make, range(100), 2))
    assert len(begun) < 10
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("method", ["mha2mla", "fisher", "transmla"])
def test_several_layers_at_a_time_come_out_as_one_at_a_time(method):
    model, text = models.llama(), models.tokens(8, 32)

    def weights(jobs):
        given = {} if method == "mha2mla" else {"calibration": text}
        made = api.compile(
            model, models.tokens(2, 8), method=method, cache_ratio=0.5, jobs=jobs, statistics_cache=False, **given
        )
        return dict(made.module.named_parameters())

    one, three = weights(1), weights(3)  # the tests run torch with one thread
    assert one.keys() == three.keys()
    assert all(torch.equal(value, three[name]) for name, value in one.items())


def test_no_layer_at_a_time_is_refused():
    with pytest.raises(UsageError, match="--jobs 0 is less than one layer"):
        api.compile(models.llama(), models.tokens(2, 8), method="mha2mla", jobs=0)
