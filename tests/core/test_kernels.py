"""The compiled loops against the same in torch or SciPy, and their independence of the number of threads."""

from __future__ import annotations

import math
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.csr import CsrMatrix
from nbmix.core.expected import ExpectedLogLikelihood, curvature, slope
from nbmix.core.kernels.elementary import log1p_and_share
from nbmix.core.kernels.sparse import compact_columns
from nbmix.core.kernels.threads import _Helpers, in_threads, over_rows
from nbmix.core.m_step import MStepProblem, NewtonMStep, moment_components
from nbmix.core.nodes import SizeFactorNodes, node_softplus
from nbmix.core.parameters import LOG_INV_DISP_RANGE, Components, GenePrior, lowest_log_mean
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.tables import (
    GENES_AT_ONCE,
    _pair_table_in_torch,
    _split_table,
    _step_table,
    batch_log_likelihood,
    likelihood_tables,
    pair_table,
)
from tests.helpers.problems import make_problem


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is not: to come to the branches for other devices."""

    device = SimpleNamespace(type="elsewhere")  # type: ignore[assignment]


def elsewhere(tensor):
    return tensor.as_subclass(Elsewhere)


def back(tensor):
    return tensor.as_subclass(torch.Tensor)


# ---- ln(1 + x) -------------------------------------------------------------------------------------


def log1p_share(x):
    grown, share, y = np.empty((3, x.size))
    log1p_and_share(x.size, x, grown, share, y, y.view(np.int64))
    return grown, share


AWKWARD = (
    np.array([0.0, 5e-324, 1e-310, 2.0**-53, 2.0**-52, 3.0**-33, 0.5, 1.0, math.sqrt(2) - 1, math.sqrt(2)]),
    np.nextafter(2.0 ** np.arange(1, 60) * math.sqrt(0.5) - 1, np.inf),
    np.nextafter(2.0 ** np.arange(1, 60) - 1, 0),
    2.0 ** np.arange(-60, 60) - 2.0**-61,
)


@pytest.mark.parametrize(
    "x",
    [np.geomspace(1e-300, 1e300, 200_001), np.geomspace(1e-4, 1e4, 200_001), *AWKWARD],
    ids=["everywhere", "around one", "corners", "cuts of the mantissa", "powers of two", "small steps"],
)
def test_log1p_and_share_are_exact_to_a_few_ulp(x):
    grown, share = log1p_share(x)
    want = np.log1p(x)
    assert (np.abs(grown - want) <= 4 * np.spacing(want)).all()
    want = x / (1 + x)
    assert (np.abs(share - want) <= 3 * np.spacing(want)).all()


def test_log1p_never_falls_as_its_argument_grows_by_more_than_its_rounding():
    x = np.geomspace(1e-20, 1e20, 100_001)
    assert (np.diff(log1p_share(x)[0]) > 0).all()


# ---- Q and the M step ------------------------------------------------------------------------------


def statistics_of(problem, n_components, sharpness=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_cells = problem.counts.shape[0]
    scores = torch.randn(n_cells, n_components, dtype=torch.float64, generator=generator)
    q = torch.softmax(sharpness * scores, 1)
    return SufficientStatistics.collect(problem.batch, problem.basis, q, torch.float64)


def random_components(n_components, n_genes, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n_components, n_genes)
    return Components(
        torch.from_numpy(rng.uniform(-16, -3, shape)), torch.from_numpy(rng.uniform(-8, 12, shape))
    )


PRIOR_ENDS = ((-12, -6), (0.01, 2), (-1, 2))


def a_prior(n_genes, seed=0):
    rng = np.random.default_rng(seed)
    centre, variance, disp = (torch.from_numpy(rng.uniform(*ends, n_genes)) for ends in PRIOR_ENDS)
    return GenePrior(centre, variance, disp, torch.tensor(2.0, dtype=torch.float64), torch.zeros(3))


class Case:
    """Statistics with one awkward shape in them."""

    def __init__(self, name):
        n_genes, n_components, keywords = 25, 3, {}
        if name == "one component":
            n_components = 1
        elif name == "many genes":  # more than one range of rows
            n_genes = 2 * GENES_AT_ONCE + 7
        elif name == "high counts":
            keywords = {"size_factors": (1e5, 1e7)}
        elif name == "one node":
            keywords = {"size_factors": (1e4, 1e4)}
        self.n_genes, self.n_components = n_genes, n_components
        self.problem = make_problem(40, n_genes, n_components, 3, **keywords)
        self.basis = self.problem.basis
        self.total = float(self.problem.size_factors.sum())
        sharpness = 30.0 if name == "hardly any cells" else 2.0
        self.statistics = statistics_of(self.problem, n_components, sharpness)
        if name == "no cells":
            self.statistics = SufficientStatistics.zeros(self.basis, n_components, "cpu")


CASES = (
    "plain",
    "one component",
    "many genes",
    "high counts",
    "one node",
    "hardly any cells",
    "no cells",
)


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def test_the_cases_hold_high_counts_and_silent_genes():
    assert Case("plain").basis.levels.n_high > 10
    assert Case("high counts").basis.levels.n_high > 300
    assert not np.diff(Case("plain").basis.levels.first)[0]


def assert_same_curvature(case, prior, components):
    flat = ExpectedLogLikelihood.of(case.statistics, case.basis, prior).curvature(
        *(t.flatten() for t in components)
    )
    got = curvature(case.statistics, case.basis, components, prior)
    want = [t.view(case.n_components, -1) for t in flat]
    scale = want[0].abs() + 1
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float64
        assert ((mine - theirs).abs() / scale).max() < 1e-11


@pytest.mark.parametrize("with_prior", [False, True])
def test_compiled_curvature_is_that_of_torch(case, with_prior):
    prior = a_prior(case.n_genes) if with_prior else None
    for seed in range(3):
        assert_same_curvature(case, prior, random_components(case.n_components, case.n_genes, seed))


@pytest.mark.parametrize("log_inv_disp", LOG_INV_DISP_RANGE)
@pytest.mark.parametrize("log_mean", [-30.0, -9.0, 5.0])
def test_compiled_curvature_is_that_of_torch_at_the_bounds(log_mean, log_inv_disp):
    case = Case("high counts")
    shape = (case.n_components, case.n_genes)
    a, b = (torch.full(shape, value, dtype=torch.float64) for value in (log_mean, log_inv_disp))
    assert_same_curvature(case, None, Components(a, b))


def test_curvature_on_other_devices_is_the_same():
    case = Case("plain")
    components = random_components(case.n_components, case.n_genes)
    there = Components(*(elsewhere(t) for t in components))
    got = curvature(case.statistics, case.basis, there, a_prior(case.n_genes))
    want = curvature(case.statistics, case.basis, components, a_prior(case.n_genes))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(back(mine), theirs, rtol=1e-9, atol=1e-6)


def test_the_compiled_slope_is_the_gradient_of_q(case):
    for seed in range(3):
        components = random_components(case.n_components, case.n_genes, seed)
        tables = likelihood_tables(case.basis, *components)
        want = curvature(case.statistics, case.basis, components)
        there = Components(*(elsewhere(t) for t in components))
        for given in (components, there):
            got = slope(case.statistics, case.basis, given, tables)
            for mine, theirs in zip(got, (want.grad_a, want.grad_b), strict=True):
                assert ((back(mine) - theirs).abs() / (want.value.abs() + 1)).max() < 1e-11


def q_of(case, components, prior):
    """(K, genes), in torch."""
    problem = ExpectedLogLikelihood.of(case.statistics, case.basis, prior)
    return problem.value(*(t.flatten() for t in components)).view(case.n_components, -1)


@pytest.mark.parametrize("start", ["moments", "anywhere"])
@pytest.mark.parametrize("with_prior", [False, True])
def test_compiled_newton_comes_to_where_torch_comes(case, with_prior, start):
    prior = a_prior(case.n_genes) if with_prior else None
    if start == "moments":
        begin = moment_components(case.statistics, case.basis, case.total)
    else:
        begin = random_components(case.n_components, case.n_genes, 7)
    before = [t.clone() for t in begin]
    newton = NewtonMStep()
    floor = lowest_log_mean(case.total)
    inside = Components(begin.log_mean.clamp(min=floor), begin.log_inv_disp.clamp(*LOG_INV_DISP_RANGE))
    was = q_of(case, inside, prior)
    found, _ = newton(case.statistics, case.basis, begin, case.total, prior)
    task = MStepProblem(case.statistics, begin, prior)
    theirs = newton.together([task], case.basis, case.total)[0].components
    mine, other = q_of(case, found, prior), q_of(case, theirs, prior)
    rounding = 1e-11 * (mine.abs() + 1)
    assert ((mine - other).abs() <= newton.tolerance + rounding).all()
    assert (mine >= was - rounding).all()
    assert all(torch.equal(t, kept) for t, kept in zip(begin, before, strict=True))


@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_compiled_newton_takes_the_steps_of_torch(case, max_steps):
    begin = random_components(case.n_components, case.n_genes, 5)
    newton = NewtonMStep(max_steps=max_steps)
    arguments = (case.statistics, case.basis, begin, case.total, a_prior(case.n_genes))
    task = MStepProblem(case.statistics, begin, a_prior(case.n_genes))
    (fit,) = newton.together([task], case.basis, case.total)
    for mine, theirs in zip(newton(*arguments).components, fit.components, strict=True):
        # a step that is worse by a rounding in one of them is taken in the other
        same = (mine - theirs).abs() < 1e-6 * (1 + theirs.abs())
        assert same.double().mean() > 0.99


@pytest.mark.parametrize("with_prior", [False, True])
def test_newton_steps_of_several_tasks_are_those_of_each(case, with_prior):
    newton = NewtonMStep()
    prior = a_prior(case.n_genes) if with_prior else None
    tasks = [
        MStepProblem(case.statistics * share, random_components(case.n_components, case.n_genes, seed), prior)
        for seed, share in enumerate((1.0, 0.3, 2.0))
    ]
    for task, fit in zip(tasks, newton.together(tasks, case.basis, case.total), strict=True):
        (alone,) = newton.together([task], case.basis, case.total)
        torch.testing.assert_close(fit.components, alone.components, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fit.curvature, alone.curvature, rtol=1e-9, atol=1e-9)


# ---- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_genes", [1, 25, GENES_AT_ONCE, 2 * GENES_AT_ONCE + 7])
def test_compiled_tables_are_those_of_other_devices(n_genes):
    problem = make_problem(30, max(n_genes, 2), 4, seed=2)
    a, b = (t[:, :n_genes] for t in random_components(4, n_genes, 2))
    got = likelihood_tables(problem.basis, a, b) if n_genes > 1 else None
    nodes = problem.basis.nodes
    wanted = node_softplus(nodes, a.T, b.T)
    if got is None:
        basis = Basis.of(problem.counts[:, :1], problem.size_factors)
        got = likelihood_tables(basis, a, b)
    torch.testing.assert_close(got.grown, wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(got.zero, torch.einsum("jkm,kj->km", wanted, torch.exp(b)), rtol=1e-13, atol=0)


def test_tables_of_other_devices_give_the_same_log_likelihood():
    problem = make_problem(seed=1)
    here = likelihood_tables(problem.basis, problem.log_mean, problem.log_inv_disp, torch.float64)
    there = likelihood_tables(
        problem.basis, elsewhere(problem.log_mean), elsewhere(problem.log_inv_disp), torch.float64
    )
    for mine, theirs in zip(here[:-2], there[:-2], strict=True):
        torch.testing.assert_close(mine, back(theirs), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("make", [_step_table, _split_table])
def test_tables_for_float32_are_the_same_on_other_devices(make, sizes):
    problem = make_problem(seed=1)
    s = problem.size_factors if sizes == "unequal" else np.full_like(problem.size_factors, 1e3)
    basis = Basis.of(problem.counts, s)
    batch = CellBatch.build(problem.counts, s, basis)
    tables = likelihood_tables(basis, problem.log_mean, problem.log_inv_disp)
    rate = tables.log_mean[:, :, None] - tables.grown @ batch.to_own.T
    here, there = (make(batch, basis, r, tables.pair, 2.0**-6) for r in (rate, elsewhere(rate)))
    torch.testing.assert_close(here, back(there), rtol=1e-6, atol=1e-9)  # the compiler fuses products


def test_the_compiled_pair_table_is_that_of_torch(case):
    for seed in range(3):
        _, b = random_components(case.n_components, case.n_genes, seed)
        got, want = pair_table(case.basis.levels, b), _pair_table_in_torch(case.basis.levels, b)
        # torch takes differences of running sums over all genes
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12 * float(want.max()))


@pytest.mark.parametrize("log_rho", [-700.0, -40.0, 0.0, 40.0, 600.0])
def test_compiled_tables_hold_any_ratio_of_mean_and_dispersion(log_rho):
    nodes = SizeFactorNodes.spanning(np.array([10.0, 1e6]))
    basis = Basis(nodes, Basis.of(sp.csr_matrix(np.ones((1, 3), np.float32)), np.ones(1)).levels)
    a = torch.full((2, 3), log_rho, dtype=torch.float64)
    got = likelihood_tables(basis, a, torch.zeros_like(a))
    want = np.logaddexp(0, nodes.log_nodes.numpy() + log_rho)
    np.testing.assert_allclose(got.grown, np.broadcast_to(want, (3, 2, len(want))), rtol=1e-12)


# ---- sparse patterns -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (40, 17), (17, 40)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_the_transpose_is_that_of_scipy_on_any_device(shape, kind):
    matrix = sp.csr_matrix(np.random.default_rng(0).random(shape) < 0.2, dtype=np.float32)
    indptr, indices = (torch.from_numpy(v).to(kind) for v in (matrix.indptr, matrix.indices))
    here = CsrMatrix(indptr, indices, None, shape[1]).transposed()
    there = CsrMatrix(elsewhere(indptr), elsewhere(indices), None, shape[1]).transposed()
    want = matrix.T.tocsr()
    want.sort_indices()
    for got in (here, there):
        assert (got.n_rows, got.n_columns) == (shape[1], shape[0])
        assert got.indptr.dtype == got.indices.dtype == kind
        np.testing.assert_array_equal(back(got.indptr), want.indptr)
        np.testing.assert_array_equal(back(got.indices), want.indices)


@pytest.mark.parametrize("size", [0, 1, 200])
def test_compacted_columns_are_numbered_in_their_order(size):
    columns = np.random.default_rng(0).integers(0, 90, size).astype(np.int32)
    used, position = np.unique(columns, return_inverse=True)
    compact = columns.copy()
    np.testing.assert_array_equal(compact_columns(compact, np.zeros(90, np.int32)), used)
    np.testing.assert_array_equal(compact, position)


# ---- threads ---------------------------------------------------------------------------------------


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
        return [*tables[:-2], log_likelihood, *statistics.tensors(), *curves, *slopes, *fitted]

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
    monkeypatch.setattr("nbmix.core.kernels.threads._helpers", _Helpers())

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("nbmix.core.kernels.threads.Thread.start", refuse)
    assert in_threads(lambda i: i * i, 5) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("n_rows", [0, 1, 8, 9])
def test_ranges_cover_all_rows_once(more_threads, n_rows):
    more_threads()
    seen = np.zeros(n_rows, int)

    def mark(begin, end, into):
        into[begin:end] += 1

    over_rows(mark, n_rows, 4, seen)
    assert (seen == 1).all()
