"""scVI, where it is installed."""

from __future__ import annotations

import pytest
from sklearn.metrics import adjusted_rand_score

from nbmix.errors import InputError
from nbmix.evaluation.baselines import scvi_latent
from tests.helpers.running import small_data


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(scvi_latent, "is_installed", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'nbmix\[scvi\]'"):
        scvi_latent.scvi_kmeans(small_data(), 2)


@pytest.mark.slow
@pytest.mark.skipif(not scvi_latent.is_installed(), reason="needs the extra nbmix[scvi]")
def test_groups_of_a_simulation():
    data = small_data(n_cells=120, n_components=2)
    assert adjusted_rand_score(data.labels, scvi_latent.scvi_kmeans(data, 2, max_epochs=200)) > 0.9
