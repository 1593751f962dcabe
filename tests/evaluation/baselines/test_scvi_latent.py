"""scVI, where it is installed."""

from __future__ import annotations

import sys

import pytest
from sklearn.metrics import adjusted_rand_score

from nbmix.errors import InputError
from nbmix.evaluation.baselines.scvi_latent import SCVI, scvi_kmeans
from tests.helpers.running import small_data


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(InputError, match=r"pip install 'nbmix\[scvi\]'"):
        scvi_kmeans(small_data(), 2)


@pytest.mark.slow
@pytest.mark.skipif(SCVI.missing, reason="needs the extra nbmix[scvi]")
def test_groups_of_a_simulation():
    data = small_data(n_cells=120, n_components=2)
    assert adjusted_rand_score(data.labels, scvi_kmeans(data, 2, max_epochs=200)) > 0.9
