from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from scipy.special import gammaln

from nbmix.core.likelihood import (
    component_log_likelihood,
    dense_component_log_likelihood,
    differentiable_log_likelihood,
)
from nbmix.errors import InputError
from tests.helpers.problems import make_problem, reference_log_likelihood
from tests.helpers.running import ROOT

PBMC = ROOT.parent / "shared" / "data" / "pbmc_facs.h5ad"

LOG_MEANS = np.array([-16.0, -12.0, -9.0, -6.0, -3.0])
LOG_INV_DISPS = np.array([-4.0, -1.0, 0.0, 2.0, 5.0, 10.0])
SIZE_FACTORS = np.array([10.0, 300.0, 4e3, 7e4, 1e6])


def extreme_counts(seed=0, cells_per_size=6):
    """Counts drawn at every pair of mean and dispersion, silent genes, and an empty cell per size factor."""
    rng = np.random.default_rng(seed)
    grid = np.array(list(itertools.product(LOG_MEANS, LOG_INV_DISPS)))
    s = np.repeat(SIZE_FACTORS, cells_per_size)
    r = np.exp(grid[:, 1])
    rate = s[:, None] * np.exp(grid[:, 0]) / r * rng.gamma(r, size=(s.size, len(grid)))
    x = np.minimum(rng.poisson(np.minimum(rate, 2**23)), 2**23)
    x = np.hstack([x, np.zeros((s.size, 4), dtype=x.dtype)])
    x[::cells_per_size] = 0
    return x, s, grid


def extreme_components(grid, n_components=5, seed=0):
    """The components the counts were drawn from, and others that shuffle the same extremes over genes."""
    rng = np.random.default_rng(seed)
    silent = np.stack([rng.uniform(-16, -3, 4), rng.uniform(-4, 10, 4)], axis=1)
    parts = [
        np.vstack([grid[rng.permutation(len(grid)) if k else slice(None)], silent])
        for k in range(n_components)
    ]
    return np.stack([part[:, 0] for part in parts]), np.stack([part[:, 1] for part in parts])


def scipy_nbinom(x, s, log_mean, log_inv_disp):
    scaled = s[:, None, None] * np.exp(log_mean - log_inv_disp)  # (cells, K, genes)
    return scipy.stats.nbinom(n=np.exp(log_inv_disp), p=1 / (1 + scaled)).logpmf(x[:, None, :]).sum(2)


# ---- values ----------------------------------------------------------------------------------------


def test_extremes_equal_scipy_nbinom_in_float64():
    x, s, grid = extreme_counts()
    log_mean, log_inv_disp = extreme_components(grid)
    got = component_log_likelihood(x, s, log_mean, log_inv_disp)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, scipy_nbinom(x, s, log_mean, log_inv_disp), rtol=1e-6)


def test_extremes_equal_the_stable_reference_more_closely():
    x, s, grid = extreme_counts(seed=1)
    log_mean, log_inv_disp = extreme_components(grid, seed=1)
    got = component_log_likelihood(x, s, log_mean, log_inv_disp)
    want = reference_log_likelihood(x, s, log_mean, log_inv_disp)
    np.testing.assert_allclose(got, want, rtol=2e-8)


@pytest.mark.parametrize("log_mean", LOG_MEANS)
@pytest.mark.parametrize("log_inv_disp", LOG_INV_DISPS)
def test_each_extreme_alone_equals_forty_digits(log_mean, log_inv_disp):
    """One gene: nothing else can hide an error. The range of s is that of the cells, so nodes interpolate."""
    s = np.repeat(SIZE_FACTORS, 6)
    x = np.tile([0, 1, 2, 20, 21, 5_000], SIZE_FACTORS.size)
    got = component_log_likelihood(x[:, None], s, [[log_mean]], [[log_inv_disp]])[:, 0]
    with mpmath.workdps(40):
        r = mpmath.exp(mpmath.mpf(log_inv_disp))
        rho = mpmath.exp(mpmath.mpf(log_mean)) / r
        want = [
            float(
                mpmath.loggamma(c + r)
                - mpmath.loggamma(r)
                - mpmath.loggamma(c + 1)
                + c * mpmath.log(size * rho)
                - (c + r) * mpmath.log1p(size * rho)
            )
            for c, size in zip(x.tolist(), s.tolist(), strict=True)
        ]
    np.testing.assert_allclose(got, want, rtol=2e-8)


def test_extremes_in_float32_keep_the_differences_between_components():
    x, s, grid = extreme_counts(seed=2)
    log_mean, log_inv_disp = (v.astype(np.float32) for v in extreme_components(grid, seed=2))
    got = component_log_likelihood(x, s, log_mean, log_inv_disp).numpy()
    want = reference_log_likelihood(x, s, log_mean, log_inv_disp)
    assert np.abs((got - got[:, :1]) - (want - want[:, :1])).max() < 0.02


def test_probabilities_of_all_counts_sum_to_one():
    x = np.arange(20_000)[:, None]
    got = component_log_likelihood(x, 1e4, [[-5.0], [-7.0]], [[0.0], [3.0]])
    np.testing.assert_allclose(torch.exp(got).sum(0), 1, rtol=1e-9)


@pytest.mark.parametrize("s", [0.0, 5e3])
def test_an_empty_cell_has_the_probability_of_its_zeros(s):
    a, b = (
        torch.tensor([[-8.0, -6.0], [-5.0, -9.0]]).double(),
        torch.tensor([[0.0, 1.0], [2.0, -1.0]]).double(),
    )
    got = component_log_likelihood(np.array([[0, 0], [3, 1]]), [s, 1e4], a, b)[0]
    torch.testing.assert_close(got, -(torch.exp(b) * torch.log1p(s * torch.exp(a - b))).sum(1))


@pytest.fixture(scope="module")
def pbmc():
    anndata = pytest.importorskip("anndata")
    if not PBMC.exists():
        pytest.skip(f"{PBMC} is not there")
    adata = anndata.read_h5ad(PBMC)
    counts = sp.csr_matrix(adata.X)
    rng = np.random.default_rng(0)
    s = np.asarray(counts.sum(1, dtype=np.float64)).ravel()
    members = [(adata.obs["cell_type"] == group).to_numpy() for group in ("b_cells", "cd34")]
    totals = np.vstack([np.asarray(counts[rows].sum(0, dtype=np.float64)) for rows in members])
    log_mean = np.log(totals + 0.5) - np.log([[s[rows].sum()] for rows in members])
    log_inv_disp = rng.uniform(-2, 5, log_mean.shape)
    want = np.zeros((counts.shape[0], 2))
    x, gene = counts.data.astype(np.float64), counts.indices
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    for k, (a, b) in enumerate(zip(log_mean, log_inv_disp, strict=True)):
        r, rho = np.exp(b), np.exp(a - b)
        part = gammaln(x + r[gene]) - gammaln(r)[gene] - gammaln(x + 1) + x * (np.log(s[row]) + (a - b)[gene])
        part -= x * np.log1p(s[row] * rho[gene])
        want[:, k] = np.bincount(row, part, minlength=len(s))
        for chunk in np.array_split(np.arange(len(s)), 20):
            want[chunk, k] -= np.log1p(s[chunk, None] * rho) @ r
    return counts, s, log_mean, log_inv_disp, want


@pytest.mark.slow
def test_whole_pbmc_matrix_equals_scipy(pbmc):
    counts, s, log_mean, log_inv_disp, want = pbmc
    got = component_log_likelihood(counts, s, log_mean, log_inv_disp)
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.slow
def test_whole_pbmc_matrix_in_float32_keeps_the_difference_of_components(pbmc):
    counts, s, log_mean, log_inv_disp, want = pbmc
    got = component_log_likelihood(counts, s, log_mean, log_inv_disp, dtype=torch.float32).numpy()
    assert np.abs((got[:, 1] - got[:, 0]) - (want[:, 1] - want[:, 0])).max() < 0.02
    np.testing.assert_allclose(got, want, rtol=1e-6)


# ---- accepted forms --------------------------------------------------------------------------------

FORMS = {
    "scipy csc": lambda x: sp.csc_matrix(x),
    "scipy coo array of integers": lambda x: sp.coo_array(x.astype(np.int64)),
    "dense array": lambda x: x,
    "dense integers": lambda x: x.astype(np.int32),
    "dense tensor": lambda x: torch.from_numpy(x),
    "torch csr": lambda x: torch_csr(x, torch.float32),
    "torch csr float64": lambda x: torch_csr(x, torch.float64),
    "torch coo": lambda x: torch.from_numpy(x).to_sparse_coo(),
}


def torch_csr(x, dtype):
    m = sp.csr_matrix(x)
    parts = (torch.from_numpy(m.indptr), torch.from_numpy(m.indices), torch.from_numpy(m.data).to(dtype))
    return torch.sparse_csr_tensor(*parts, size=m.shape, check_invariants=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")  # torch's, about the input
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_counts_gives_the_same(problem, form):
    want = component_log_likelihood(
        problem.counts, problem.size_factors, problem.log_mean, problem.log_inv_disp
    )
    counts = FORMS[form](problem.counts.toarray())
    got = component_log_likelihood(counts, problem.size_factors, problem.log_mean, problem.log_inv_disp)
    assert torch.equal(got, want)


@pytest.mark.parametrize("form", ["list", "column", "tensor", "float32 tensor"])
def test_every_form_of_the_size_factors_gives_the_same(problem, form):
    s = problem.size_factors.astype(np.float32).astype(np.float64)
    given = {
        "list": s.tolist(),
        "column": s[:, None],
        "tensor": torch.from_numpy(s),
        "float32 tensor": torch.from_numpy(s).float(),
    }[form]
    parameters = (problem.log_mean, problem.log_inv_disp)
    want = component_log_likelihood(problem.counts, s, *parameters)
    assert torch.equal(component_log_likelihood(problem.counts, given, *parameters), want)


@pytest.mark.parametrize("one", [1e4, np.float64(1e4), np.array([1e4]), torch.tensor(1e4), 10_000])
def test_one_number_is_the_size_factor_of_all_cells(problem, one):
    parameters = (problem.log_mean, problem.log_inv_disp)
    got = component_log_likelihood(problem.counts, one, *parameters)
    assert torch.equal(got, component_log_likelihood(problem.counts, np.full(40, 1e4), *parameters))
    np.testing.assert_allclose(
        got, reference_log_likelihood(problem.counts.toarray(), 1e4, *parameters), rtol=1e-12
    )


def test_sparse_form_equals_the_dense_form(problem):
    got = component_log_likelihood(
        problem.counts, problem.size_factors, problem.log_mean, problem.log_inv_disp
    )
    dense = dense_component_log_likelihood(
        torch.from_numpy(problem.counts.toarray()).double(),
        torch.from_numpy(problem.size_factors),
        problem.log_mean,
        problem.log_inv_disp,
    )
    torch.testing.assert_close(got, dense, rtol=1e-8, atol=0)


def test_dense_form_equals_scipy_nbinom():
    x, s, grid = extreme_counts(seed=3, cells_per_size=3)
    log_mean, log_inv_disp = extreme_components(grid, n_components=2, seed=3)
    got = dense_component_log_likelihood(
        torch.from_numpy(x).double(),
        torch.from_numpy(s),
        torch.from_numpy(log_mean),
        torch.from_numpy(log_inv_disp),
    )
    np.testing.assert_allclose(got, scipy_nbinom(x, s, log_mean, log_inv_disp), rtol=1e-6)


def test_result_is_float64_also_from_float32_components(problem):
    got = component_log_likelihood(
        problem.counts, problem.size_factors, problem.log_mean.float(), problem.log_inv_disp.float()
    )
    assert got.dtype == torch.float64


def test_permuted_cells_genes_and_components_give_permuted_results(problem, generator):
    n, p = problem.counts.shape
    cells, genes, parts = (torch.randperm(size, generator=generator) for size in (n, p, 3))
    want = component_log_likelihood(
        problem.counts, problem.size_factors, problem.log_mean, problem.log_inv_disp
    )
    got = component_log_likelihood(
        problem.counts[cells.numpy()][:, genes.numpy()],
        problem.size_factors[cells.numpy()],
        problem.log_mean[parts][:, genes],
        problem.log_inv_disp[parts][:, genes],
    )
    torch.testing.assert_close(got, want[cells][:, parts], rtol=1e-12, atol=0)


# ---- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_gradcheck(seed):
    problem = make_problem(n_cells=6, n_genes=5, n_components=2, seed=seed)

    def loglik(log_mean, log_inv_disp):
        return differentiable_log_likelihood(
            log_mean, log_inv_disp, problem.batch, problem.basis, torch.float64
        )

    a, b = problem.log_mean.clone().requires_grad_(), problem.log_inv_disp.clone().requires_grad_()
    assert torch.autograd.gradcheck(loglik, (a, b), eps=1e-6, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(2))
def test_gradient_equals_autograd_through_the_dense_form(seed, dtype, generator):
    problem = make_problem(seed=seed)
    out = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    a, b = problem.log_mean.clone().requires_grad_(), problem.log_inv_disp.clone().requires_grad_()
    got = component_log_likelihood(problem.counts, problem.size_factors, a, b, dtype=dtype)
    got = torch.autograd.grad((got * out).sum(), (a, b))
    x, s = torch.from_numpy(problem.counts.toarray()).double(), torch.from_numpy(problem.size_factors)
    dense = dense_component_log_likelihood(x, s, a, b)
    want = torch.autograd.grad((dense * out).sum(), (a, b))
    tolerance = 1e-8 if dtype == torch.float64 else 1e-5
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_gradient_reaches_parameters_below_the_components(problem):
    """As in an amortized model: log_mean = base + shift, in float32."""
    shift = torch.zeros(3, 1, requires_grad=True)
    loglik = component_log_likelihood(
        problem.counts,
        problem.size_factors,
        problem.log_mean.float() + shift,
        problem.log_inv_disp.float(),
    )
    loglik.sum().backward()
    assert shift.grad is not None
    up, down = (
        component_log_likelihood(
            problem.counts, problem.size_factors, problem.log_mean + h, problem.log_inv_disp
        ).sum(0)
        for h in (1e-4, -1e-4)
    )
    torch.testing.assert_close(shift.grad[:, 0].double(), (up - down) / 2e-4, rtol=1e-4, atol=1e-2)


# ---- bad input -------------------------------------------------------------------------------------


def spoilt(value):
    x = np.ones((3, 4))
    x[1, 2] = value
    return x


def nbinom_arguments(**changed):
    arguments = {
        "counts": np.ones((3, 4)),
        "size_factors": np.full(3, 10.0),
        "log_mean": np.zeros((2, 4)),
        "log_inv_disp": np.zeros((2, 4)),
    }
    return arguments | changed


BAD = {
    "negative count": ({"counts": spoilt(-1)}, "negative"),
    "fractional count": ({"counts": spoilt(0.5)}, "fractional"),
    "NaN count": ({"counts": spoilt(np.nan)}, "NaN"),
    "infinite count": ({"counts": spoilt(np.inf)}, "infinite"),
    "negative sparse count": ({"counts": sp.csr_matrix(spoilt(-1))}, "negative"),
    "NaN in a tensor": ({"counts": torch.from_numpy(spoilt(np.nan))}, "NaN"),
    "count above what float32 holds": ({"counts": spoilt(2.0**25)}, "2\\*\\*24"),
    "counts of one dimension": ({"counts": np.ones(4)}, "dimensions"),
    "counts as a string": ({"counts": "counts"}, "str"),
    "genes do not match": ({"counts": np.ones((3, 5))}, "log_mean"),
    "log_mean of one dimension": ({"log_mean": np.zeros(4), "log_inv_disp": np.zeros(4)}, "log_mean"),
    "components do not match": ({"log_inv_disp": np.zeros((3, 4))}, "log_inv_disp"),
    "too few size factors": ({"size_factors": np.ones(2)}, "size_factors"),
    "too many size factors": ({"size_factors": np.ones((3, 2))}, "size_factors"),
    "negative size factor": ({"size_factors": [1.0, -1.0, 1.0]}, "size_factors"),
    "negative single size factor": ({"size_factors": -1.0}, "size_factors"),
    "NaN size factor": ({"size_factors": [1.0, np.nan, 1.0]}, "size_factors"),
    "infinite size factor": ({"size_factors": [1.0, np.inf, 1.0]}, "size_factors"),
    "no size for a cell with counts": ({"size_factors": [1.0, 0.0, 1.0]}, "size_factors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_culprit(name):
    changed, says = BAD[name]
    with pytest.raises(InputError, match=says) as caught:
        component_log_likelihood(**nbinom_arguments(**changed))
    assert "\n" not in str(caught.value)
