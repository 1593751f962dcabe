"""What every model has already: held-out cells scored, genes left out, and a record in its checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from nbmix.data.checkpoint import SECTION
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.mixture_em import MixtureEM
from tests.helpers.running import fit, small_data

MODELS = pytest.mark.parametrize("kind", [MixtureEM, AmortizedMixture])


class Watch(pl.Callback):
    """Held-out log likelihood as logged, whether the fit had begun, and the last checkpoint."""

    def __init__(self):
        self.held_out, self.begun = [], []

    def on_validation_end(self, trainer, model):
        if not trainer.sanity_checking:
            self.held_out.append(float(trainer.callback_metrics["heldout_log_likelihood"]))

    def on_train_epoch_start(self, trainer, model):
        self.begun.append(model.has_begun)

    def on_train_end(self, trainer, model):
        self.checkpoint = {"state_dict": model.state_dict()}  # as Lightning begins it
        model.on_save_checkpoint(self.checkpoint)
        self.progress = model.objective, model.n_iterations
        model.objective, model.n_iterations = [], 0
        model.on_load_checkpoint(self.checkpoint)
        self.fingerprint = model.data.fingerprint
        self.values = model.sum_over_ranks(1.5, 2.0)
        self.sent = model.from_first_rank(torch.arange(3))


@MODELS
def test_a_fit_keeps_what_it_promises(kind):
    data, watch = small_data(), Watch()
    model = kind(data.gene_names, n_components=2)
    module, _ = fit(model, data, epochs=3, callbacks=[watch], validation_share=0.2)
    assert watch.begun == [False, True, True]
    assert len(watch.held_out) == 3
    with torch.no_grad():
        scored = torch.cat([model.held_out_log_likelihood(batch) for batch in module.val_dataloader()])
    assert scored.numel() == 12
    assert watch.held_out[-1] == pytest.approx(float(scored.mean()), rel=1e-9)
    record = watch.checkpoint[SECTION]
    assert (record["model"], record["settings"]) == (kind.kind, model.plain)
    assert record["gene_names"] == data.gene_names.tolist()
    assert record["median_size_factor"] == np.median(data.size_factors[module.training_rows])
    assert record["cells"] == watch.fingerprint
    assert (model.objective, model.n_iterations) == watch.progress
    assert model.n_iterations == 3
    assert (watch.values, watch.sent.tolist()) == ([1.5, 2.0], [0, 1, 2])


@MODELS
def test_genes_that_are_left_out_leave_the_others_as_they_were(kind):
    data = small_data()
    model = kind(data.gene_names, n_components=2)
    fit(model, data, epochs=1)
    before, kept = model.mixture.components(), np.array([5, 0, 30])
    model.restrict_genes(kept)
    after = model.mixture.components()
    assert model.gene_names.tolist() == data.gene_names[kept].tolist()
    for was, now in zip(before, after, strict=True):
        assert torch.equal(now, was[:, kept])
