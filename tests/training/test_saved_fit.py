"""Checkpoints of fits that are made in Python."""

from __future__ import annotations

import numpy as np
import torch

from nbmix.models.mixture_em import MixtureEM
from nbmix.models.restore import restore
from nbmix.training.saved_fit import Progress, SavedFit, checkpoint_of, load_fit, save_fit
from tests.helpers.running import NO_PICTURES, TINY, fit, run_here, small_data


def test_written_and_read(tmp_path):
    data = small_data()
    model = MixtureEM(data.gene_names, n_components=2)
    module, _ = fit(model, data, epochs=3)
    saved = SavedFit(checkpoint_of(model, module), Progress.of(model), {"mine": [1, "a", None]})
    save_fit(tmp_path / "a.ckpt", saved)
    again = load_fit(tmp_path / "a.ckpt")
    assert (again.progress, again.own) == (saved.progress, saved.own)
    assert again.progress.n_iterations == 3
    assert again.fitted.cells == ""  # nothing is known of the cells
    assert again.fitted.median_size_factor == np.median(data.size_factors[module.training_rows])
    assert again.fitted.gene_names.tolist() == data.gene_names.tolist()
    for name, value in restore(again.fitted).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_of_the_command(tmp_path):
    metrics = run_here(tmp_path, *TINY, NO_PICTURES, "trainer.max_epochs=3")
    saved = load_fit(tmp_path / "checkpoints/last.ckpt")
    assert saved.own == {}
    assert saved.progress.n_iterations == metrics["n_iterations"]
    assert saved.progress.converged == metrics["converged"]
