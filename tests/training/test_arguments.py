"""Models, starts and seeds as Python names them, with the defaults of conf/."""

from __future__ import annotations

import numpy as np
import pytest
from hydra.utils import instantiate

from nbmix.errors import InputError
from nbmix.starts.clusters import KMeansStart
from nbmix.starts.named import named_starts
from nbmix.training.arguments import given, model_of, models_in_python, plain, seed_of, start_of
from tests.helpers.running import configure


def test_models_that_can_be_named():
    named = list(models_in_python())
    assert named == sorted(named)
    assert {"amortized", "em"} <= set(named)
    assert not {"gmvae", "vaec"} & set(named)


@pytest.mark.parametrize("name", models_in_python())
def test_the_defaults_of_conf(name):
    conf = configure(f"model={name}")
    kind, settings = model_of(name, {"n_components": 4}, None)
    assert settings == {"n_components": 4}
    assert kind(["g"], **settings).plain == instantiate(conf.model, gene_names=["g"]).plain
    assert start_of(kind.defaults.start) == instantiate(conf.start)


def test_a_model_takes_what_it_has():
    common = {"n_components": np.int64(3), "folds": 2, "tolerance": 1e-3}
    assert model_of("amortized", common, {"n_hidden": np.int64(8)}).settings == {
        "n_components": 3,
        "n_hidden": 8,
    }
    with pytest.raises(InputError, match="model=em has no 'n_hidden'; its settings are components_per"):
        model_of("em", common, {"n_hidden": 8})
    with pytest.raises(InputError, match=r"model=vaec: choose one of amortized, em\b"):
        model_of("vaec", common, None)


def test_a_start_is_a_name_or_an_object():
    start = KMeansStart(n_init=2)
    assert start_of(start) is start
    assert start_of("kmeans") == KMeansStart()
    with pytest.raises(InputError, match=f"start=best: choose one of {', '.join(named_starts())}, or an"):
        start_of("best")


def test_seeds():
    assert seed_of(np.int64(3)) == 3
    assert seed_of(np.random.RandomState(1)) == seed_of(np.random.RandomState(1))
    assert seed_of(None) != seed_of(None)
    for bad in (-1, "a", 1.5):
        with pytest.raises(InputError, match=f"random_state={bad}: must be a whole number"):
            seed_of(bad)


def test_numbers_of_numpy_become_those_of_python():
    assert type(plain(np.float32(0.5))) is float
    assert type(given(np.int64(1), 2)) is int
    assert given(None, 2) == 2
