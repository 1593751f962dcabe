"""The density of components under what they are drawn from, and the floor of means."""

from __future__ import annotations

import math

import numpy as np
import scipy.stats
import torch

from nbmix.core.parameters import FEWEST_COUNTS, Components, lowest_log_mean
from tests.helpers.cases import a_prior


def test_the_log_density_is_that_of_two_normals_but_for_a_constant_of_each_gene():
    prior, rng = a_prior(7), np.random.default_rng(0)
    components = Components(*(torch.from_numpy(rng.normal(size=(3, 7))) for _ in range(2)))
    normal = scipy.stats.norm.logpdf
    of_mean = normal(components.log_mean, prior.log_mean, prior.log_mean_variance.sqrt())
    of_disp = normal(components.log_inv_disp, prior.log_inv_disp, float(prior.log_inv_disp_variance) ** 0.5)
    lacks = of_mean + of_disp - prior.log_density(components).numpy()
    np.testing.assert_allclose(lacks, np.broadcast_to(lacks[0], (3, 7)), rtol=1e-12)
    at_centre = Components(prior.log_mean[None], prior.log_inv_disp[None])
    assert (prior.log_density(at_centre) == 0).all()
    assert (prior.log_density(components) < 0).all()


def test_the_lowest_mean_explains_the_fewest_counts_in_the_whole_data():
    assert math.isclose(math.exp(lowest_log_mean(2e6)) * 2e6, FEWEST_COUNTS)
