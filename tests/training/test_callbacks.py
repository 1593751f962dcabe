"""Checkpoints after every epoch, progress, label scores that change nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from nbmix.data.module import CountsDataModule
from nbmix.evaluation.metrics import clustering_metrics
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.mixture_em import MixtureEM
from nbmix.progress import listening
from nbmix.starts.clusters import KMeansStart
from nbmix.training.callbacks import FITTING, BestCheckpoint, FitProgress, LabelScores, LastCheckpoint
from nbmix.training.trainer import build_trainer
from tests.helpers.running import small_data


class Recorder(pl.Callback):
    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(model, data, callbacks, *, epochs=3, **batches):
    module = CountsDataModule(
        lambda: data, folds=model.mixture.settings.folds, shuffle=model.shuffle, **batches
    )
    module.setup()
    start = KMeansStart()(module.training_data, model.mixture.settings, np.random.default_rng(0))
    model.begin(start, module)
    recorder = Recorder()
    trainer = build_trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, recorder],
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    )
    trainer.fit(model, datamodule=module)
    return recorder.epochs


def em(data):
    return MixtureEM(data.gene_names, n_components=2, folds=3)


def amortized(data):
    torch.manual_seed(0)
    return AmortizedMixture(data.gene_names, n_components=2, n_hidden=4, train_components=False)


@pytest.mark.parametrize("make", [em, amortized])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_last_checkpoint_is_that_of_the_last_epoch(make, share, tmp_path):
    # frozen components: no epoch is better than the first, and yet the last one must be there
    data = small_data()
    model = make(data)
    callbacks = [BestCheckpoint(str(tmp_path)), LastCheckpoint(str(tmp_path))]
    epochs = fit(model, data, callbacks, validation_share=share, batch_size=20)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    for name, value in model.state_dict().items():
        assert torch.equal(last["state_dict"][name], value), name
    key = "heldout_log_likelihood" if share else "objective"
    known = [epoch.get(key, -np.inf) for epoch in epochs]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == int(np.argmax(known))


@pytest.mark.parametrize("share, saved", [(1e9, [0, 1, 2]), (1e-9, [0, 2])])
def test_epochs_that_are_saved(share, saved, tmp_path):
    """All of them; or the first and the last, where little time may go into it."""
    seen = []

    class Saved(pl.Callback):
        def on_train_batch_start(self, *_):
            seen.append(torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"])

        on_train_end = on_train_batch_start

    data = small_data()
    fit(em(data), data, [LastCheckpoint(str(tmp_path), share), Saved()])
    assert sorted(set(seen)) == saved


@pytest.mark.parametrize("make", [em, amortized])
def test_label_scores_are_those_of_the_training_cells(make):
    data = small_data()
    logged = fit(make(data), data, [LabelScores()], batch_size=20, epochs=2)[-1]
    model = make(data)
    seen = {}

    class Keep(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            seen.clear()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            q = outputs["responsibilities"]
            seen.update(dict(zip(batch.rows.tolist(), q.double().numpy(), strict=True)))

    fit(model, data, [Keep()], batch_size=20, epochs=2)
    rows = sorted(seen)
    scores = clustering_metrics(data.labels[rows], np.stack([seen[row] for row in rows]))
    assert logged["label/ari"] == pytest.approx(scores["ari"], rel=1e-6)
    assert logged["label/cross_entropy"] == pytest.approx(scores["log_loss"], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("make", [em, amortized])
def test_label_scores_change_nothing_and_need_no_labels(make):
    data = small_data()
    first, second = make(data), make(data)
    scored = fit(first, data, [LabelScores()], batch_size=20)
    plain = fit(second, replace(data, labels=None), [LabelScores()], batch_size=20)
    assert any("label/ari" in epoch for epoch in scored)
    assert not any("label/ari" in epoch for epoch in plain)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_logged_scalars_of_amortized_inference():
    data = small_data()
    logged = fit(amortized(data), data, [], batch_size=20)[-1]
    assert {
        *("elbo", "objective", "expected_log_likelihood", "log_prior", "entropy", "heldout_log_likelihood"),
        *("gradient_norm/encoder", "gradient_norm/log_mean", "gradient_norm/log_inv_disp"),
    } <= set(logged)
    parts = sum(logged[name] for name in ("expected_log_likelihood", "log_prior", "entropy"))
    assert parts == pytest.approx(logged["elbo"], rel=1e-6)


@pytest.mark.parametrize("make, unit", [(em, "iterations"), (amortized, "epochs")])
def test_progress_of_a_fit(make, unit):
    """It moves within an epoch, never back, and says how it ended."""
    data, steps = small_data(), []
    with listening(steps.append):
        fit(make(data), data, [FitProgress()], batch_size=20)
    assert {step.phase for step in steps} == {FITTING}
    done = [step.done for step in steps]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 3
    assert any(0 < d < 1 for d in done)
    assert [step.has_ended for step in steps[:-1]] == [False] * (len(steps) - 1)
    assert steps[-1].has_ended and f"after 3 {unit}; " in steps[-1].state
    assert all(word in steps[-1].state for word in ("objective", "held-out"))


def test_progress_says_that_a_fit_has_converged():
    data, steps = small_data(), []
    with listening(steps.append):
        fit(em(data), data, [FitProgress()], epochs=50)
    assert re.match(r"converged after \d+ iterations; objective -", steps[-1].state)
    assert steps[-1].done < steps[-1].total == 50
