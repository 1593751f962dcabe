"""The fit that the command and the estimator have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.core.joins import group_probabilities
from nbmix.data.checkpoint import SECTION, load_checkpoint, write_checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.mixture_em import MixtureEM
from nbmix.models.restore import restore
from nbmix.starts.choice import Choice
from nbmix.starts.clusters import KMeansStart, LabelsStart
from nbmix.starts.given import CheckpointStart
from nbmix.starts.random import RandomStart
from nbmix.starts.subsample import SubsampleStart
from nbmix.training.callbacks import BestCheckpoint, LastCheckpoint
from nbmix.training.fit import ModelSpec, fit
from nbmix.training.trainer import build_trainer
from tests.helpers.running import fit as fit_by_hand
from tests.helpers.running import small_data

DATA = small_data()


def spec(n_components=2, **settings):
    settings |= {"n_components": n_components, "folds": 3}
    return ModelSpec(MixtureEM, settings, lambda names, size: MixtureEM(names, **settings | size))


def cells(**batches):
    return CountsDataModule(lambda: DATA, folds=3, **batches)


def trainer_for(folder=None, epochs=4):
    callbacks = [] if folder is None else [LastCheckpoint(str(folder), share=1e9)]
    return build_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=bool(callbacks))


def same_components(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_the_parts_in_their_order():
    model = MixtureEM(DATA.gene_names, n_components=2, folds=3)
    _, by_hand = fit_by_hand(model, DATA, epochs=4, start=KMeansStart())
    fitted = fit(spec(components_per_group=1), KMeansStart(), cells(), trainer_for(), seed=0)
    assert fitted.model.choice is None
    assert same_components(fitted.model, model)
    torch.testing.assert_close(fitted.cells.responsibilities, by_hand.responsibilities, rtol=0, atol=0)
    assert fitted.model.groups == ((0,), (1,))
    assert fitted.model.joins.most_groups == 2


def test_components_are_joined_to_groups_by_their_size():
    fitted = fit(spec(), KMeansStart(), cells(), trainer_for(), seed=0)
    groups, settings = fitted.model.groups, fitted.model.mixture.settings
    assert (settings.n_components, settings.n_groups) == (5, 2)  # 54 cells, 10 for each component
    assert sorted(c for group in groups for c in group) == list(range(5))
    q = group_probabilities(fitted.cells.responsibilities.numpy(), groups)
    assert adjusted_rand_score(DATA.labels, q.argmax(1)) == 1
    sizes = np.bincount(q.argmax(1), minlength=2)
    assert sizes[0] >= sizes[1] > 0


@pytest.mark.parametrize("start", [RandomStart(n_starts=2), KMeansStart()], ids=["random", "kmeans"])
def test_an_open_number_of_groups_is_as_many_as_have_gaps(start, tmp_path):
    fitted = fit(spec("1-3"), start, cells(), trainer_for(tmp_path, 2), seed=0)
    assert len(fitted.model.groups) == fitted.model.joins.n_with_gaps == 2
    assert fitted.model.plain["n_components"] == 2
    gone_on = fit(spec("1-3"), start, cells(), trainer_for(), seed=0, ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(gone_on.model.groups) == 2
    three = fit(spec("3-4"), start, cells(), trainer_for(), seed=0)
    assert len(three.model.groups) == 3


@pytest.mark.parametrize("start", [RandomStart(n_starts=2), KMeansStart()], ids=["random", "kmeans"])
def test_an_open_number_of_components_is_an_elbow(start, tmp_path):
    one = spec("1-3", components_per_group=1)
    fitted = fit(one, start, cells(), trainer_for(tmp_path, 2), seed=0)
    choice = Choice.of(fitted.model.choice)
    assert choice.recommended == fitted.model.mixture.settings.n_components == 2
    gone_on = fit(one, start, cells(), trainer_for(), seed=0, ckpt_path=str(tmp_path / "last.ckpt"))
    assert gone_on.model.choice == fitted.model.choice
    assert gone_on.model.mixture.settings.n_components == 2


def test_checkpoints_hold_the_groups(tmp_path):
    fitted = fit(spec(), KMeansStart(), cells(), trainer_for(tmp_path), seed=0)
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint.sealed
    restored = restore(checkpoint)
    assert restored.groups == fitted.model.groups
    assert restored.joins == fitted.model.joins
    assert same_components(restored, fitted.model)


def test_more_groups_than_components_with_cells_are_groups_without_cells():
    fitted = fit(spec(9, components_per_group=2), KMeansStart(), cells(), trainer_for(), seed=0)
    model = fitted.model
    q = group_probabilities(fitted.cells.responsibilities.numpy(), model.groups)
    assert q.shape == (60, 9)
    assert sorted(c for group in model.groups for c in group) == list(range(18))


def test_no_checkpoint_of_an_earlier_fit_is_left(tmp_path):
    def trainer(epochs):
        callbacks = [BestCheckpoint(str(tmp_path)), LastCheckpoint(str(tmp_path), share=1e9)]
        return build_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)

    fit(spec(), KMeansStart(), cells(), trainer(4), seed=0)
    assert (tmp_path / "best.ckpt").exists()
    fit(spec(3), KMeansStart(), cells(validation_share=0.0), trainer(1), seed=0)
    assert not (tmp_path / "best.ckpt").exists()  # EM has no objective in its first iteration
    assert restore(load_checkpoint(tmp_path / "last.ckpt")).mixture.settings.n_groups == 3


def test_components_of_a_checkpoint_are_joined_and_stay_as_they_are(tmp_path):
    _, whole, said = fit(spec(), KMeansStart(), cells(), trainer_for(tmp_path), seed=0)
    filled = set(said.responsibilities.argmax(1).tolist())  # others belong to any group
    data = CountsDataModule(lambda: DATA, shuffle=True, batch_size=20)
    settings = {"n_components": 2, "train_components": False}
    encoder = ModelSpec(
        AmortizedMixture, settings, lambda names, size: AmortizedMixture(names, **settings | size)
    )
    begun = fit(encoder, CheckpointStart(tmp_path / "last.ckpt"), data, trainer_for(epochs=2), seed=0).model
    assert torch.equal(begun.mixture.log_mean[-1], whole.mixture.log_mean[-1])
    found, expected = ({frozenset(group) & filled for group in model.groups} for model in (begun, whole))
    assert found == expected


def test_components_that_are_more_than_cells():
    with pytest.raises(InputError, match=r"^model.components_per_group=40: makes 80 components for 2 groups"):
        fit(spec(components_per_group=40), KMeansStart(), cells(), trainer_for(), seed=0)


def test_components_that_cannot_be_joined():
    refused = r"^model.components_per_group=2: this fit cannot tell which components belong together; set 1"
    with pytest.raises(InputError, match=refused):
        fit(spec(components_per_group=2), LabelsStart(), cells(), trainer_for(), seed=0)
    labelled = fit(spec(), LabelsStart(), cells(), trainer_for(), seed=0)  # whose components are the labels
    assert labelled.model.groups == ((0,), (1,))


def test_encoders_join_what_the_start_has_not_seen(tmp_path):
    data = CountsDataModule(lambda: DATA, shuffle=True, batch_size=20, validation_share=0.0)
    settings = {"n_components": 2, "encoder_epochs": 10, "lr": 1e-2}
    encoder = ModelSpec(
        AmortizedMixture, settings, lambda names, size: AmortizedMixture(names, **settings | size)
    )
    fitted = fit(encoder, SubsampleStart(inner=KMeansStart()), data, trainer_for(tmp_path, 12), seed=0)
    q = group_probabilities(fitted.cells.responsibilities.numpy(), fitted.model.groups)
    assert fitted.model.mixture.settings.n_components == 6
    assert adjusted_rand_score(DATA.labels, q.argmax(1)) == 1
    path = str(tmp_path / "last.ckpt")
    gone_on = fit(encoder, SubsampleStart(), data, trainer_for(epochs=13), seed=0, ckpt_path=path)
    assert {frozenset(group) for group in gone_on.model.groups} == {frozenset(g) for g in fitted.model.groups}
    assert gone_on.model.joins == fitted.model.joins


def test_a_fit_that_goes_on_ends_where_the_whole_one_does(tmp_path):
    whole = fit(spec(), KMeansStart(), cells(), trainer_for(), seed=0)
    fit(spec(), KMeansStart(), cells(), trainer_for(tmp_path, 2), seed=0)
    rest = fit(spec(), KMeansStart(), cells(), trainer_for(), seed=0, ckpt_path=str(tmp_path / "last.ckpt"))
    assert rest.model.objective == whole.model.objective
    assert same_components(rest.model, whole.model)


def test_ready_is_said_once_input_is_known_to_be_good():
    said = []

    def ready():
        said.append(trainer.current_epoch)

    trainer = trainer_for()
    with pytest.raises(InputError, match="there are only 54 cells to fit"):
        fit(spec(55), KMeansStart(), cells(), trainer, seed=0, when_ready=ready)
    assert said == []
    model = fit(spec(), KMeansStart(), cells(), trainer, seed=0, when_ready=ready).model
    assert said == [0]
    assert model.n_iterations == 4


def test_what_cannot_be_gone_on_with(tmp_path):
    fit(spec(), KMeansStart(), cells(), trainer_for(tmp_path, 1), seed=0)
    path = tmp_path / "last.ckpt"

    def go_on(**batches):
        fit(spec(), KMeansStart(), cells(**batches), trainer_for(), seed=0, ckpt_path=str(path))

    with pytest.raises(InputError, match=r"last\.ckpt: was fitted to other cells"):
        go_on(seed=1)
    content = torch.load(path, weights_only=True)
    del content["optimizer_states"]
    write_checkpoint(content, path)
    with pytest.raises(InputError, match=r"last\.ckpt: is damaged, or of another version of nbmix"):
        go_on()
    del content[SECTION]["checksum"]
    torch.save(content, path)
    with pytest.raises(InputError, match=r"has no checksum; only what train\.py saves can be gone on with"):
        go_on()


def test_the_seed_is_that_of_the_start():
    class Draws:
        def __call__(self, data, settings, generator):
            drawn.append(generator.random())
            return KMeansStart()(data, settings, np.random.default_rng(0))

    drawn = []
    for seed in (1, 1, 2):
        fit(spec(), Draws(), cells(), trainer_for(epochs=1), seed=seed)
    assert drawn[0] == drawn[1] != drawn[2]
