"""Work on several threads: the results of one, in their order, whatever happens."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch

from nbmix.core.batch import CellBatch
from nbmix.core.expected_log_likelihood import curvature, slope
from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.kernels.threads import Helpers, in_threads, over_rows
from nbmix.core.m_step import NewtonMStep
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.tables import (
    batch_log_likelihood,
    likelihood_tables,
)
from tests.helpers.cases import a_prior, random_components
from tests.helpers.problems import make_problem


@pytest.fixture(params=[2, 3])
def more_threads(request):
    """To be called for that many threads instead of one."""
    yield lambda: torch.set_num_threads(request.param)
    torch.set_num_threads(1)


def test_results_do_not_depend_on_the_number_of_threads(more_threads):
    problem = make_problem(30, 3 * GENES_AT_ONCE, 4, seed=6)
    prior, begin = a_prior(3 * GENES_AT_ONCE), random_components(4, 3 * GENES_AT_ONCE)
    total = float(problem.size_factors.sum())

    def results(dtype):
        batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, keep=True)
        tables = likelihood_tables(problem.basis, problem.log_mean, problem.log_inv_disp, dtype)
        log_likelihood = batch_log_likelihood(batch, problem.basis, tables)
        q = torch.softmax(0.01 * log_likelihood, 1)
        statistics = SufficientStatistics.collect(batch, problem.basis, q, dtype)
        arguments = (statistics, problem.basis, begin)
        fitted = NewtonMStep(max_steps=8)(*arguments, total, prior).components
        curves = curvature(*arguments, prior)
        slopes = slope(*arguments, likelihood_tables(problem.basis, *begin))
        return [*tables[:4], log_likelihood, *statistics.tensors(), *curves, *slopes, *fitted]

    for dtype in (torch.float32, torch.float64):
        torch.set_num_threads(1)
        alone = results(dtype)
        more_threads()
        together = results(dtype)
        assert len(alone) == len(together)
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("n_items", [0, 1, 7])
def test_work_in_threads_comes_back_in_order(more_threads, n_items):
    more_threads()
    assert list(in_threads(lambda i: i * i, n_items)) == [i * i for i in range(n_items)]


def test_work_in_threads_may_itself_use_threads(more_threads):
    more_threads()  # all of them wait here for what the others would have to do

    def outer(i):
        return sum(in_threads(lambda j: i * j, 6))

    assert in_threads(outer, 8) == [i * 15 for i in range(8)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12
def test_work_in_threads_in_a_forked_process(more_threads):
    more_threads()
    in_threads(lambda i: i, 4)  # threads that the child will not have
    child = os.fork()
    if child == 0:
        os._exit(0 if in_threads(lambda i: i * i, 5) == [0, 1, 4, 9, 16] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_in_a_thread_is_raised(more_threads):
    more_threads()
    with pytest.raises(ZeroDivisionError):
        over_rows(lambda begin, end: 1 // (begin - 4), 10, 2)


def test_after_an_error_nothing_more_is_begun(more_threads):
    more_threads()
    begun = []

    def work(i):
        begun.append(i)
        if i == 0:
            raise KeyError
        time.sleep(0.05)

    with pytest.raises(KeyError):
        in_threads(work, 200)
    assert len(begun) <= 8


def test_work_is_done_where_the_system_starts_no_thread(more_threads, monkeypatch):
    more_threads()

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    assert in_threads(lambda i: i * i, 5, Helpers()) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("n_rows", [0, 1, 8, 9])
def test_ranges_cover_all_rows_once(more_threads, n_rows):
    more_threads()
    seen = np.zeros(n_rows, int)

    def mark(begin, end, into):
        into[begin:end] += 1

    over_rows(mark, n_rows, 4, seen)
    assert (seen == 1).all()


def test_a_system_without_forks(monkeypatch):
    """As Windows is."""
    monkeypatch.delattr(os, "register_at_fork", raising=False)
    torch.set_num_threads(2)
    try:
        assert in_threads(lambda i: i * i, 5, Helpers()) == [0, 1, 4, 9, 16]
    finally:
        torch.set_num_threads(1)
