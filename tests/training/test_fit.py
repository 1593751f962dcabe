"""The fit that the command and the estimator have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.data.checkpoint import SECTION, write_checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.mixture_em import MixtureEM
from nbmix.starts.clusters import KMeansStart
from nbmix.starts.random import RandomStart
from nbmix.training.callbacks import LastCheckpoint
from nbmix.training.fit import ModelSpec, fit
from nbmix.training.predict import predict
from nbmix.training.trainer import build_trainer
from tests.helpers.running import fit as fit_by_hand
from tests.helpers.running import small_data

DATA = small_data()


def spec(n_components=2, **settings):
    return ModelSpec(
        lambda names, k: MixtureEM(names, n_components=k, folds=3, **settings),
        n_components,
    )


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
    trainer = trainer_for()
    fitted = fit(spec(), KMeansStart(), cells(), trainer, seed=0)
    assert fitted.choice is None
    assert same_components(fitted.model, model)
    torch.testing.assert_close(
        predict(trainer, fitted.model, fitted.data).responsibilities, by_hand.responsibilities, rtol=0, atol=0
    )


@pytest.mark.parametrize("start", [RandomStart(n_starts=2), KMeansStart()], ids=["random", "kmeans"])
def test_an_open_number_of_components_is_chosen_and_kept(start, tmp_path):
    fitted = fit(spec("1-3"), start, cells(), trainer_for(tmp_path, 2), seed=0)
    assert fitted.choice.recommended == fitted.model.mixture.settings.n_components == 2
    assert fitted.model.choice == fitted.choice.plain
    gone_on = fit(spec("1-3"), start, cells(), trainer_for(), seed=0, ckpt_path=str(tmp_path / "last.ckpt"))
    assert gone_on.model.choice == fitted.model.choice
    assert gone_on.model.mixture.settings.n_components == 2


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
