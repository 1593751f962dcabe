"""Near misses are named."""

from __future__ import annotations

import inspect

import pytest

import nbmix
from nbmix.core.m_step import GradientMStep
from nbmix.errors import did_you_mean, naming_the_nearest
from nbmix.starts.clusters import KMeansStart


@pytest.mark.parametrize(
    "word, end",
    [
        ("n_component", "; did you mean model.n_components?"),
        ("fold", "; did you mean model.folds?"),
        ("x", ""),
    ],
)
def test_the_nearest_word(word, end):
    assert did_you_mean(word, ["folds", "n_components"], "model.") == end


def test_a_decorated_function_keeps_its_signature():
    def add(first: int, *, second: int = 2) -> int:
        return first + second

    decorated = naming_the_nearest(add)
    assert decorated(1, second=3) == 4
    assert inspect.signature(decorated) == inspect.signature(add)


@pytest.mark.parametrize(
    "call, arguments, near",
    [
        (nbmix.NBMixture, {"n_component": 3}, "n_components"),
        (nbmix.NBMixture().fit, {"X": None, "btach": None}, "batch"),
        (nbmix.NBMixture().predict, {"X": None, "size_factor": None}, "size_factors"),
        (nbmix.NBMixture.load, {"path": "x", "keys": "nbmix"}, "key"),
        (lambda **named: nbmix.cluster(nbmix_adata(), **named), {"key_add": "x"}, "key_added"),
        (lambda **named: nbmix.cluster(nbmix_adata(), **named), {"randomstate": 1}, "random_state"),
        (lambda **named: nbmix.read_10x("folder", **named), {"genomes": "hg19"}, "genome"),
        (nbmix.compare, {"referenc": "0"}, "reference"),
        (nbmix.merge, {"names": "x"}, "name"),
        (nbmix.rename, {"keys": "x"}, "key"),
        (nbmix.regroup, {"keyadded": "x"}, "key_added"),
        (nbmix.simulate, {"seeds": 1}, "seed"),
        (nbmix.pl.embedding, {"colour": "group"}, "color"),
        (KMeansStart, {"n_pc": 3}, "n_pcs"),
        (GradientMStep, {"num_epoch": 3}, "num_epochs"),
    ],
)
def test_arguments_that_there_are_not(call, arguments, near):
    with pytest.raises(TypeError, match=f"unexpected keyword argument .*; did you mean {near}\\?$"):
        call(**arguments)


def nbmix_adata():
    import anndata

    return anndata.AnnData(nbmix.simulate(n=20, p=10, k=2, seed=1).counts)
