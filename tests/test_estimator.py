"""The estimator: scikit-learn's habits, fits, and the numbers of train.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hydra.utils import instantiate
from sklearn.base import clone, is_clusterer
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import nbmix
from nbmix import NBMixture
from nbmix.core.m_step import NewtonMStep
from nbmix.data.checkpoint import load_checkpoint
from nbmix.errors import InputError
from tests.helpers.estimators import AMORTIZED, COUNTS, EM, SIMULATION, annotated, same_bits
from tests.helpers.running import TINY, configure, run_here


@pytest.fixture(scope="module")
def fitted() -> NBMixture:
    return NBMixture(**EM).fit(COUNTS)


def rounded(X):
    """Whole numbers in place of numbers of any kind; what holds none is left as it is."""
    if sp.issparse(X):
        return X.__class__((np.rint(10 * np.abs(X.data)), X.indices, X.indptr), shape=X.shape)
    if np.asarray(X).dtype.kind == "c":
        return X
    try:
        numbers = np.rint(10 * np.abs(np.asarray(X, dtype=np.float64)))
    except (TypeError, ValueError):
        return X
    return pd.DataFrame(numbers, X.index, X.columns) if isinstance(X, pd.DataFrame) else numbers


class NBMixtureOfRounded(NBMixture):
    """Takes any numbers for counts, so that scikit-learn's checks, which draw from normals, say something."""

    def fit(self, X, y=None, *, size_factors=None, batch=None):
        return super().fit(rounded(X), y, size_factors=size_factors, batch=batch)

    def partial_fit(self, X, y=None, *, size_factors=None):
        return super().partial_fit(rounded(X), y, size_factors=size_factors)

    def predict_proba(self, X, *, size_factors=None, batch=None):
        return super().predict_proba(rounded(X), size_factors=size_factors, batch=batch)

    def score_samples(self, X, *, size_factors=None, batch=None):
        return super().score_samples(rounded(X), size_factors=size_factors, batch=batch)


EXPECTED_FAILURES = {
    "check_fit_score_takes_y": "calls partial_fit after fit, which keeps no sums to go on from",
    "check_positive_only_tag_during_fit": "rounding takes the sign away; negative counts are tested below",
    "check_estimator_sparse_array": "reads the tags of a classifier of whatever has predict_proba",
    "check_estimator_sparse_matrix": "the same; sparse input is tested below",
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [NBMixtureOfRounded(n_components=2, start="kmeans", max_iter=3)],
    expected_failed_checks=lambda _: EXPECTED_FAILURES,
    xfail_strict=True,
)
def test_scikit_learns_habits(estimator, check):
    check(estimator)


@pytest.mark.parametrize("name", nbmix.__all__)
def test_what_the_package_exports(name):
    assert getattr(nbmix, name) is not None
    assert name in dir(nbmix)


def test_the_package_has_no_other_name():
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        nbmix.fit  # noqa: B018 (the attribute is what is tested)


def test_the_bare_import_is_light():
    code = "import nbmix, sys; print(sorted({'torch', 'numpy', 'pytorch_lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_the_user_says_otherwise(given, found):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    code = "import nbmix, os; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.decode().split() == [found]


def test_components_are_found(fitted):
    assert is_clusterer(fitted)
    assert adjusted_rand_score(SIMULATION.labels, fitted.labels_) == 1
    order = [np.bincount(fitted.labels_[SIMULATION.labels == k]).argmax() for k in range(2)]
    deviation = fitted.log_mean_[order] - SIMULATION.log_mean
    well_seen = np.exp(SIMULATION.log_mean) * 1e4 * len(SIMULATION.labels) / 2 > 100  # counts
    # row sums as size factors are another unit: the same shift for all genes of a component
    deviation -= deviation.mean(axis=1, keepdims=True)
    assert np.abs(deviation[well_seen]).mean() < 0.3
    assert fitted.converged_
    assert fitted.lower_bound_ == fitted.lower_bounds_[-1]
    assert fitted.weights_.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "form",
    [
        *(
            getattr(sp, f"{kind}_{what}")
            for kind in ("csr", "csc", "coo", "lil")
            for what in ("matrix", "array")
        ),
        lambda x: x.toarray().astype(np.int64),
        lambda x: x.toarray().tolist(),
        lambda x: pd.DataFrame(x.toarray().astype(np.int32), columns=[f"g{j}" for j in range(x.shape[1])]),
        ad.AnnData,
    ],
    ids=lambda form: getattr(form, "__name__", None),
)
def test_every_form_of_input_gives_the_same_bits(form, fitted):
    x = form(COUNTS)
    again = NBMixture(**EM).fit(x)
    assert same_bits(again, fitted)
    assert again.n_features_in_ == COUNTS.shape[1]
    np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(COUNTS))


@pytest.mark.parametrize("settings", [EM, AMORTIZED], ids=["em", "amortized"])
def test_the_same_seed_gives_the_same_bits_and_leaves_other_generators_alone(settings):
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 (not used)
    one, again, other = (NBMixture(**settings, random_state=seed).fit(COUNTS) for seed in (3, 3, 4))
    assert same_bits(one, again)
    assert not same_bits(one, other)
    one.predict(COUNTS)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002 (not used)


def test_generators_of_scikit_learn_are_taken():
    one, again = (NBMixture(**EM, random_state=np.random.RandomState(5)).fit(COUNTS) for _ in range(2))
    assert same_bits(one, again)


@pytest.mark.parametrize(
    "overrides, settings",
    [
        ([], {}),
        (["model.folds=1"], {"folds": 1}),
        (["model=amortized", "start=kmeans", "trainer.max_epochs=2"], {"model": "amortized", "max_iter": 2}),
        (["model.n_components=1-3", "start=random"], {"n_components": "1-3", "start": "random"}),
        (
            ["model.n_components=1-3", "start=random", "model.components_per_group=1"],
            {"n_components": "1-3", "start": "random", "components_per_group": 1},
        ),
    ],
    ids=["em", "plain", "amortized", "open K", "elbow"],
)
def test_the_numbers_of_train(overrides, settings, tmp_path):
    run_here(tmp_path, *TINY, *overrides, "data.validation_share=0", "seed=2")
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    adata = ad.AnnData(result.X, obs=result.obs[["nbmix_size_factor"]], var=result.var)
    mixture = NBMixture(**{"n_components": 2, "start": "kmeans", "random_state": 2} | settings).fit(adata)
    np.testing.assert_array_equal(mixture.responsibilities_, result.obsm["X_nbmix"])
    np.testing.assert_array_equal(mixture.log_likelihoods_, result.obs["nbmix_log_likelihood"])
    np.testing.assert_array_equal(mixture.log_mean_.T, result.varm["nbmix_log_mean"])
    np.testing.assert_array_equal(mixture.lower_bounds_, result.uns["nbmix"]["objective"])
    loaded = NBMixture.load(tmp_path / "checkpoints" / "last.ckpt")
    np.testing.assert_array_equal(loaded.log_inv_disp_.T, result.varm["nbmix_log_inv_disp"])
    np.testing.assert_array_equal(loaded.predict_proba(adata), mixture.predict_proba(adata))
    assert loaded.n_iter_ == mixture.n_iter_
    assert loaded.model == mixture.model
    assert loaded.folds == mixture.folds
    assert loaded.n_components_ == mixture.n_components_ == 2
    np.testing.assert_array_equal(mixture.component_groups_, loaded.component_groups_)
    if settings.get("folds") != 1:
        pd.testing.assert_frame_equal(loaded.joins_, mixture.joins_)
    if settings.get("components_per_group") == 1:
        chosen = pd.read_csv(tmp_path / "n_components.csv")
        pd.testing.assert_frame_equal(mixture.choice_, chosen, rtol=1e-7)
        mixture.save(tmp_path / "mine.ckpt")
        for again in (loaded, NBMixture.load(tmp_path / "mine.ckpt")):
            pd.testing.assert_frame_equal(again.choice_, mixture.choice_)
    else:
        assert loaded.choice_ is None


@pytest.mark.parametrize("model", ["em", "amortized"])
def test_the_defaults_of_train(model, tmp_path):
    conf = configure(f"model={model}")
    assert conf.model.n_components == NBMixture().n_components
    NBMixture(model=model).fit(COUNTS).save(tmp_path / "a.ckpt")
    settings = load_checkpoint(tmp_path / "a.ckpt").settings
    assert settings.pop("components_per_group") == 1  # genes are independent; conf has "auto"
    expected = instantiate(conf.model, gene_names=["g"]).plain
    assert expected.pop("components_per_group") == "auto"
    assert settings == expected


def test_size_factors(fitted):
    sizes = COUNTS.sum(1)
    adata = annotated()
    given = NBMixture(**EM).fit(COUNTS, size_factors=np.asarray(sizes).ravel())
    assert same_bits(given, fitted)
    of_one = NBMixture(**EM).fit(adata.X, size_factors=1e4)
    of_key = NBMixture(**EM, size_factor_key="molecules").fit(adata)
    assert same_bits(of_one, of_key)
    assert not same_bits(of_one, fitted)
    np.testing.assert_array_equal(
        of_one.predict_proba(adata.X, size_factors=1e4), of_key.predict_proba(adata)
    )


def test_labels_as_a_start():
    mixture = NBMixture(2, start="labels", folds=3).fit(COUNTS, SIMULATION.labels)
    np.testing.assert_array_equal(mixture.labels_, SIMULATION.labels)
    with pytest.raises(InputError, match="give the labels as y"):
        NBMixture(2, start="labels").fit(COUNTS)


def test_weights_given_for_each_cell():
    adata = annotated()
    mixture = NBMixture(**EM, weights="given", prior_key="prior").fit(adata)
    assert mixture.predict_proba(adata).shape == (120, 2)
    empty = adata[:2].copy()
    empty.X = sp.csr_matrix(([1.0], ([0], [0])), shape=(2, 60))
    np.testing.assert_allclose(mixture.predict_proba(empty)[1], adata.obsm["prior"][1])
    assert mixture.weights_.tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match=r"^weights=given: .* set prior_key to such a field of obsm"):
        NBMixture(**EM, weights="given").fit(adata)


LABELS = pd.Series(np.where(np.arange(COUNTS.shape[0]) % 2, "a", "b"), index=annotated().obs_names)


@pytest.mark.parametrize(
    "y, words",
    [
        (LABELS.where(LABELS == "a"), "y misses the label of "),
        (LABELS.where(LABELS == "a").astype("category"), "y misses the label of "),
        (LABELS.where(LABELS == "a").astype("string"), "y misses the label of "),
        (LABELS.where(LABELS == "a", None).tolist(), "y misses the label of "),
        (LABELS[::-1], "y: has the cells in another order; give y.loc"),
        (np.ones((COUNTS.shape[0], 2)), "y has shape "),
    ],
)
def test_labels_to_start_from(y, words):
    with pytest.raises(InputError, match=words) as refused:
        NBMixture(2, start="labels").fit(annotated(), y)
    assert "\n" not in str(refused.value)


def test_labels_that_no_start_sees_may_be_missing():
    y = LABELS.where(LABELS == "a")
    assert same_bits(NBMixture(**EM).fit(COUNTS, y.to_numpy()), NBMixture(**EM).fit(COUNTS))


@pytest.mark.parametrize(
    "counts, words",
    [
        (
            COUNTS * 0.5,
            r"^counts: X holds fractional values \(first: .* at cell '0', gene '\d+'\); nbmix needs raw",
        ),
        (COUNTS * -1, "counts: X holds negative values"),
        (COUNTS.toarray() * np.nan, "counts: X holds NaN"),
        (COUNTS * 0, "every cell is empty"),
        (COUNTS[:1], "a minimum of 2 is required by NBMixture"),
        (np.ones(3), "Expected 2D array"),
    ],
)
def test_what_is_none_of_a_count_is_refused(counts, words):
    with pytest.raises(ValueError, match=words) as refused:
        NBMixture(**EM).fit(counts)
    if isinstance(refused.value, InputError):
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "vae"}, r"^model=vae: choose one of amortized, em\b"),
        ({"start": "best"}, "^start=best: choose one of dirichlet, first_batch, "),
        ({"n_components": 0}, "^n_components=0: must be 1 or more$"),
        (
            {"n_components": 200},
            "^n_components=200: there are only 120 cells to fit; choose fewer components$",
        ),
        ({"n_components": 2.5}, "^n_components=2.5: must be a whole number$"),
        (
            {"n_components": "8-2"},
            "^n_components=8-2: a range goes from a lower to a higher number, from 1 on$",
        ),
        ({"n_components": "many"}, "^n_components=many: give a whole number, auto, or a range as in 2-10$"),
        ({"folds": 121}, "^folds=121: there are only 120 cells to fit; use fewer$"),
        ({"tol": 0}, "^tol=0: must be above 0$"),
        ({"max_iter": 0}, "^max_iter=0: must be 1 or more$"),
        ({"batch_size": 0}, "^batch_size=0: must be 1 or more$"),
        ({"weights": "equal"}, "^weights=equal: choose one of"),
        (
            {"model_settings": {"n_hidden": 3}},
            "^model_settings: model=em has no 'n_hidden'; its settings are components_per_group,",
        ),
        ({"random_state": -1}, "^random_state=-1: must be a whole number from 0 on, or None$"),
        ({"random_state": "a"}, "^random_state=a: must be a whole number"),
        ({"layer": "counts"}, "^layer='counts': a csr_matrix has none; give an AnnData$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_used(settings, words):
    with pytest.raises(InputError, match=words):
        NBMixture(**{"start": "kmeans"} | settings).fit(COUNTS)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"layer": "counts"}, r"^adata: no layer 'counts'; set layer to one of its layers \(none\)$"),
        (
            {"size_factor_key": "depth"},
            "^adata: obs has no column 'depth'; set size_factor_key to one of its",
        ),
        ({"prior_key": "depth"}, "^adata: obsm has no entry 'depth'; set prior_key to one of its"),
    ],
)
def test_fields_that_are_not_there(settings, words):
    with pytest.raises(InputError, match=words):
        NBMixture(**settings).fit(annotated())


def test_size_factors_that_do_not_fit():
    with pytest.raises(InputError, match="name the column by size_factor_key"):
        NBMixture(**EM).fit(annotated(), size_factors=1e4)
    with pytest.raises(InputError, match="size_factors holds 3 values for 120 cells"):
        NBMixture(**EM).fit(COUNTS, size_factors=[1, 2, 3])
    with pytest.raises(InputError, match="size factors must be finite and positive"):
        NBMixture(**EM).fit(COUNTS, size_factors=-1)


def test_nothing_is_known_before_a_fit(tmp_path):
    mixture = NBMixture()
    for method in (mixture.predict, mixture.score, mixture.bic):
        with pytest.raises(NotFittedError):
            method(COUNTS)
    for method in (mixture.sample, partial(mixture.save, tmp_path / "a.ckpt")):
        with pytest.raises(NotFittedError):
            method()
    with pytest.raises(InputError):
        mixture.fit(COUNTS * 0.5)
    with pytest.raises(NotFittedError):
        mixture.predict(COUNTS)


def test_a_fit_that_stops_early_says_so():
    with pytest.warns(ConvergenceWarning, match="has not converged in max_iter=2 iterations") as warned:
        mixture = NBMixture(**EM, max_iter=2).fit(COUNTS)
    assert warned[0].filename == __file__
    assert (mixture.converged_, mixture.n_iter_, mixture.lower_bounds_.shape) == (False, 2, (1,))


def test_a_search_over_components_finds_them():
    search = GridSearchCV(NBMixture(start="kmeans", folds=2), {"n_components": np.arange(1, 3)}, cv=2)
    assert search.fit(COUNTS).best_params_ == {"n_components": 2}


def test_the_model_has_its_own_settings():
    exact = NBMixture(**EM, model_settings={"dtype": "float64", "patience": np.int64(1)}).fit(COUNTS)
    assert exact.n_iter_ <= NBMixture(**EM).fit(COUNTS).n_iter_
    assert clone(exact).model_settings == {"dtype": "float64", "patience": 1}


def test_nothing_is_said_and_no_file_is_written(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    for settings in (EM, AMORTIZED):
        NBMixture(**settings).fit(COUNTS).predict(COUNTS)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if not record.name.startswith("nbmix")]


def test_a_job_of_many_processes_does_not_matter(monkeypatch, fitted):
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "a", "SLURM_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert same_bits(NBMixture(**EM).fit(COUNTS), fitted)


class Interrupted(NewtonMStep):
    """An M step in which somebody presses Ctrl-C."""

    def __call__(self, *_, **__):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def handler():
    """Python's own for Ctrl-C, which a shell has ignored where it runs tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_one(handler):
    with pytest.raises(KeyboardInterrupt):
        NBMixture(**EM, model_settings={"m_step": Interrupted()}).fit(COUNTS)
    assert signal.getsignal(signal.SIGINT) is handler
