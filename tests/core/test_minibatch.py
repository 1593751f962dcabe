"""A step's fused log likelihood and encoder layer against SciPy, the dense forms and the tables of EM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.core.batch import CellBatch, pair_product
from nbmix.core.likelihood import dense_component_log_likelihood, differentiable_log_likelihood
from nbmix.core.minibatch import (
    log_count_product,
    minibatch_log_likelihood,
    nonzeros_log_likelihood,
    nonzeros_weight_slope,
)
from tests.helpers.problems import make_problem, reference_log_likelihood


def with_gradient(of, parameters, weight):
    """Value of a function of some parameters, and the gradient of its weighted sum."""
    parameters = [p.clone().requires_grad_() for p in parameters]
    value = of(*parameters)
    return value.detach(), torch.autograd.grad((value * weight).sum(), parameters)


def likelihood(problem, **how):
    return lambda a, b: minibatch_log_likelihood(a, b, problem.batch, problem.basis, **how)


@pytest.mark.parametrize("genes_at_once", [7, 2048])
@pytest.mark.parametrize("shape", [(40, 25, 3), (300, 9, 1), (3, 600, 12)])
def test_equals_scipy_and_autograd_through_the_dense_form(shape, genes_at_once, generator):
    problem = make_problem(*shape)
    components = problem.log_mean, problem.log_inv_disp
    weight = torch.randn(shape[0], shape[2], dtype=torch.float64, generator=generator)
    value, slopes = with_gradient(likelihood(problem, genes_at_once=genes_at_once), components, weight)
    x = problem.counts.toarray()
    np.testing.assert_allclose(
        value, reference_log_likelihood(x, problem.size_factors, *components), rtol=1e-8, atol=1e-9
    )
    x, s = torch.from_numpy(x).double(), torch.from_numpy(problem.size_factors)
    _, wanted = with_gradient(lambda a, b: dense_component_log_likelihood(x, s, a, b), components, weight)
    for got, want in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))


@pytest.mark.parametrize("seed", range(2))
def test_gradcheck(seed):
    problem = make_problem(n_cells=6, n_genes=5, n_components=2, seed=seed)
    components = (problem.log_mean.requires_grad_(), problem.log_inv_disp.requires_grad_())
    assert torch.autograd.gradcheck(likelihood(problem), components, eps=1e-6, atol=1e-4, rtol=1e-5)


def test_equals_the_tables_that_other_devices_use(problem, generator):
    components = problem.log_mean, problem.log_inv_disp
    weight = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    value, slopes = with_gradient(likelihood(problem), components, weight)

    def tables(a, b):
        return differentiable_log_likelihood(a, b, problem.batch, problem.basis, torch.float64)

    wanted, wanted_slopes = with_gradient(tables, components, weight)
    torch.testing.assert_close(value, wanted, rtol=1e-8, atol=0)
    torch.testing.assert_close(slopes, wanted_slopes, rtol=1e-7, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 25, 3), (300, 9, 1), (3, 600, 12)])
def test_the_form_of_gpus_equals_the_compiled_one(shape, generator):
    problem = make_problem(*shape)
    components = problem.log_mean, problem.log_inv_disp
    weight = torch.randn(shape[0], shape[2], dtype=torch.float64, generator=generator)

    def of_nonzeros(a, b):
        return nonzeros_log_likelihood(a, b, problem.batch, problem.basis.levels)

    value, slopes = with_gradient(of_nonzeros, components, weight)
    wanted, wanted_slopes = with_gradient(likelihood(problem), components, weight)
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-9)
    for got, want in zip(slopes, wanted_slopes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * float(want.abs().max()))


def test_no_result_depends_on_the_number_of_threads(problem):
    components, weight = (problem.log_mean, problem.log_inv_disp), torch.ones(40, 3)
    results = []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            results.append(with_gradient(likelihood(problem, genes_at_once=4), components, weight))
    finally:
        torch.set_num_threads(1)
    (value, slopes), (other, other_slopes) = results
    assert torch.equal(value, other)
    assert all(torch.equal(a, b) for a, b in zip(slopes, other_slopes, strict=True))


def test_components_keep_their_dtype(problem):
    components = problem.log_mean.float(), problem.log_inv_disp.float()
    value, slopes = with_gradient(likelihood(problem), components, torch.ones(40, 3))
    assert value.dtype == torch.float64
    assert all(slope.dtype == torch.float32 for slope in slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encoder_layer_equals_the_dense_product(problem, dtype, generator):
    weight = torch.randn(25, 6, dtype=dtype, generator=generator)
    out = torch.randn(40, 6, dtype=dtype, generator=generator)
    levels = problem.basis.levels
    log_counts = torch.log1p(torch.from_numpy(problem.counts.toarray()).to(dtype))
    got = with_gradient(lambda w: log_count_product(problem.batch, levels, w), (weight,), out)
    torch.testing.assert_close(got, with_gradient(lambda w: log_counts @ w, (weight,), out))

    def by_pairs(w):
        size = torch.log1p(levels.count[problem.batch.used])[:, None].to(dtype)
        return pair_product(problem.batch, w[levels.gene[problem.batch.used]] * size)

    torch.testing.assert_close(got, with_gradient(by_pairs, (weight,), out))
    # the gradient that GPUs take
    of_pairs = (levels.gene[problem.batch.used], torch.log1p(levels.count[problem.batch.used]).to(dtype))
    of_nonzeros = (t[problem.batch.pairs.indices] for t in of_pairs)
    torch.testing.assert_close(nonzeros_weight_slope(problem.batch, *of_nonzeros, out, 25), got[1][0])


def test_a_batch_without_counts(problem):
    batch = CellBatch.build(problem.counts[:1], problem.size_factors[:1] * 0, problem.basis)
    components = problem.log_mean, problem.log_inv_disp
    value, slopes = with_gradient(
        lambda a, b: minibatch_log_likelihood(a, b, batch, problem.basis), components, torch.ones(1, 3)
    )
    assert value.abs().max() == 0
    assert all(slope.abs().max() == 0 for slope in slopes)
    value, slopes = with_gradient(
        lambda a, b: nonzeros_log_likelihood(a, b, batch, problem.basis.levels), components, torch.ones(1, 3)
    )
    assert value.abs().max() == 0
    assert all(slope.abs().max() == 0 for slope in slopes)
    got, (slope,) = with_gradient(
        lambda w: log_count_product(batch, problem.basis.levels, w), (torch.ones(25, 2),), torch.ones(1, 2)
    )
    assert got.abs().max() == slope.abs().max() == 0
