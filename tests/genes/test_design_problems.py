"""Curves of genes with covariates against finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from nbmix.genes.design import Design
from nbmix.genes.design_problems import NegativeBinomialWithDesign, PoissonProfile, ZeroInflatedWithDesign
from nbmix.genes.labelled import LabelledCounts
from tests.helpers.labelled import (
    agrees_with_finite_differences,
    simulated,
)


@pytest.mark.parametrize(
    "kind, n_numbers", [(PoissonProfile, 2), (NegativeBinomialWithDesign, 8), (ZeroInflatedWithDesign, 11)]
)
def test_curve_with_covariates_equals_finite_differences(generator, kind, n_numbers):
    x, labels, s = simulated(zero=0.3)
    data = LabelledCounts.checked(x, labels, s / s.mean())
    design = Design.checked(np.random.default_rng(1).normal(size=(len(s), 2)), data)
    agrees_with_finite_differences(kind.of(design, data, np.arange(12)), (12, n_numbers), generator)
