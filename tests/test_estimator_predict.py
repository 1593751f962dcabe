"""What a fit says of cells, draws, and keeps when it is saved."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.metrics import adjusted_rand_score

from nbmix import NBMixture, cluster
from nbmix.data.checkpoint import SECTION, write_checkpoint
from nbmix.data.zheng import MIXTURES
from nbmix.errors import InputError
from tests.helpers.estimators import AMORTIZED, COUNTS, EM, annotated, same_bits
from tests.helpers.problems import reference_log_likelihood
from tests.helpers.running import ROOT, run_here

PBMC = ROOT / ".." / "shared" / "data" / "pbmc_facs.h5ad"


@pytest.fixture(scope="module")
def fitted() -> NBMixture:
    return NBMixture(**EM).fit(COUNTS)


@pytest.fixture(scope="module", params=[EM, AMORTIZED], ids=["em", "amortized"])
def of_either_mode(request) -> NBMixture:
    return NBMixture(**request.param).fit(annotated())


def test_log_likelihoods_are_those_of_scipy(of_either_mode):
    mixture, adata = of_either_mode, annotated()
    part = np.flatnonzero(np.isfinite(mixture.log_mean_[0]))
    x = adata.X.toarray()
    parameters = mixture.component_log_mean_[:, part], mixture.component_log_inv_disp_[:, part]
    terms = reference_log_likelihood(x[:, part], x.sum(1), *parameters) + np.log(mixture.component_weights_)
    expected = logsumexp(terms, axis=1)
    np.testing.assert_allclose(mixture.score_samples(adata), expected, rtol=1e-6)
    # the fit's own products are in float32, to 0.01 nats
    np.testing.assert_allclose(mixture.log_likelihoods_, expected, rtol=0, atol=0.01)
    assert mixture.score(adata) == pytest.approx(expected.mean(), rel=1e-6)
    n_components = len(mixture.component_weights_)
    assert n_components >= mixture.n_components_ == 2
    n_free = 2 * n_components * part.size + n_components - 1
    assert mixture.bic(adata) == pytest.approx(-2 * expected.sum() + n_free * np.log(120), rel=1e-6)


def test_doubt_of_new_cells_is_what_cluster_writes_where_one_copy_judges_all():
    adata = annotated()
    cluster(adata, **EM | {"folds": 1})
    found = NBMixture(**EM | {"folds": 1}).fit(adata).doubt(adata)
    assert found.index.equals(adata.obs_names)
    second = adata.obs["nbmix_second"].astype(int)
    assert np.array_equal(found["second"], second)
    for name in ("margin", "misfit"):
        np.testing.assert_allclose(found[name], adata.obs[f"nbmix_{name}"], rtol=0, atol=0.02)
    assert np.array_equal(found["ambiguous"], found["margin"] < np.log(9))
    assert np.array_equal(found["fits_no_group"], found["misfit"] >= np.log(1000))


def test_doubt_of_a_cell_does_not_depend_on_the_others(of_either_mode):
    adata = annotated()
    whole, part = of_either_mode.doubt(adata), of_either_mode.doubt(adata[5:9].copy())
    np.testing.assert_allclose(part[["margin", "misfit"]], whole[["margin", "misfit"]][5:9], rtol=1e-5)


def test_silent_genes_take_no_part_and_have_no_numbers(of_either_mode):
    assert of_either_mode.n_features_in_ == 60
    assert np.flatnonzero(np.isnan(of_either_mode.log_mean_).any(0)).tolist() == [3]
    assert np.flatnonzero(np.isnan(of_either_mode.log_inv_disp_).any(0)).tolist() == [3]
    assert of_either_mode.sample(50)[0][:, [3]].nnz == 0


def test_predictions_do_not_depend_on_the_batches(of_either_mode):
    """16,800 cells are more than are taken at once."""
    times = 140
    adata = annotated()
    expected = np.tile(of_either_mode.predict_proba(adata), (times, 1))
    many = ad.AnnData(sp.vstack([adata.X] * times), var=adata.var)
    np.testing.assert_allclose(of_either_mode.predict_proba(many), expected, rtol=1e-6, atol=1e-9)


def test_empty_cells_alone_have_the_weights(of_either_mode):
    """As they have among others."""
    adata = annotated()
    adata.X = sp.vstack([adata.X[:2] * 0, adata.X[2:]]).tocsr()
    among = of_either_mode.predict_proba(adata)[:2]
    np.testing.assert_allclose(of_either_mode.predict_proba(adata[:2].copy()), among, rtol=1e-6)


def test_new_cells_are_brought_to_the_genes_by_name(of_either_mode, caplog):
    mixture, adata = of_either_mode, annotated()
    expected = mixture.predict_proba(adata)
    backwards = adata[:, ::-1].copy()
    np.testing.assert_allclose(mixture.predict_proba(backwards), expected, rtol=1e-6, atol=1e-9)
    assert "missing" not in caplog.text
    fewer = adata[:, 10:].copy()
    mixture.predict(fewer)
    assert (
        "9 of its 59 genes are missing in the data and are left out (g0, g1, g2, g4, g5, ...)" in caplog.text
    )
    other = ad.AnnData(adata.X, var=pd.DataFrame(index=[f"h{j}" for j in range(60)]))
    with pytest.raises(InputError, match="was fitted to other genes"):
        mixture.predict(other)


def test_names_and_numbers_of_genes(fitted):
    assert not hasattr(fitted, "feature_names_in_")
    np.testing.assert_array_equal(fitted.predict(ad.AnnData(COUNTS)), fitted.predict(COUNTS))
    with pytest.raises(InputError, match="adata: has 59 genes; the fit had 60, without names"):
        fitted.predict(ad.AnnData(COUNTS[:, :59]))
    with pytest.raises(ValueError, match="X has 59 features, but NBMixture is expecting 60"):
        fitted.predict(COUNTS[:, :59])
    of_names = NBMixture(**EM).fit(annotated())
    assert of_names.feature_names_in_[:2].tolist() == ["g0", "g1"]


def test_sampled_cells_have_the_moments_of_the_groups(fitted):
    n, s = 40_000, 5e3  # more than are drawn at once
    counts, z = fitted.sample(n, size_factors=s)
    assert counts.shape == (n, 60)
    share = np.bincount(z) / n
    assert np.abs(share - fitted.weights_).max() < 4.5 * np.sqrt(0.25 / n)
    for k in range(2):
        x = counts[z == k].toarray().astype(float)
        mean, r = s * np.exp(fitted.log_mean_[k]), np.exp(fitted.log_inv_disp_[k])
        variance = mean + mean**2 / r
        assert np.abs((x.mean(0) - mean) / np.sqrt(variance / len(x))).max() < 4.5
        of_rare = mean > 0.05  # of fewer counts a variance of 20,000 cells is too uncertain
        np.testing.assert_allclose(x.var(0)[of_rare], variance[of_rare], rtol=0.2)


def test_sampled_cells_are_negative_binomials_of_the_components():
    n, s = 40_000, 5e3
    fitted = NBMixture(**EM, components_per_group=1).fit(COUNTS)
    counts, z = fitted.sample(n, size_factors=s)
    for k in range(2):
        x = counts[z == k].toarray().astype(float)
        mean, r = s * np.exp(fitted.log_mean_[k]), np.exp(fitted.log_inv_disp_[k])
        p_zero = scipy.stats.nbinom.pmf(0, r, r / (r + mean))
        seen = len(x) * np.minimum(p_zero, 1 - p_zero) > 10  # where the number of zeros is nearly normal
        assert seen.sum() > 20
        deviation = ((x == 0).mean(0) - p_zero) / np.sqrt(p_zero * (1 - p_zero) / len(x))
        assert np.abs(deviation[seen]).max() < 4.5


def test_samples_repeat_and_have_the_depth_of_the_fit(fitted):
    one, again = fitted.sample(200), fitted.sample(200)
    assert (one[0] != again[0]).nnz == 0
    np.testing.assert_array_equal(one[1], again[1])
    depths = [float(np.median(np.asarray(counts.sum(1)))) for counts in (one[0], COUNTS)]
    assert depths[0] == pytest.approx(depths[1], rel=0.1)
    sizes = np.repeat([1e2, 1e5], 100)
    assert (
        fitted.sample(200, size_factors=sizes)[0][100:].sum()
        > 500 * fitted.sample(100, size_factors=1e2)[0].sum()
    )
    for bad, words in ((0, "n_samples=0: must be 1 or more"), (3, "size_factors holds 2 values for 3 cells")):
        with pytest.raises(InputError, match=words):
            fitted.sample(bad, size_factors=[1.0, 2.0])


def test_saved_and_loaded(of_either_mode, tmp_path):
    mixture, path = of_either_mode, tmp_path / "a.ckpt"
    mixture.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    again = NBMixture.load(path)
    assert type(again) is NBMixture
    adata = annotated()
    for method in ("predict_proba", "score_samples"):
        np.testing.assert_array_equal(getattr(again, method)(adata), getattr(mixture, method)(adata))
    for name in ("log_mean_", "log_inv_disp_", "weights_", "lower_bounds_", "feature_names_in_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(mixture, name))
    assert (again.n_features_in_, again.n_iter_, again.converged_) == (
        60,
        mixture.n_iter_,
        mixture.converged_,
    )
    for name in ("n_components", "model", "start", "folds", "max_iter", "random_state"):
        assert getattr(again, name) == getattr(mixture, name)
    assert same_bits(clone(again).fit(adata), mixture)
    again.save(path)
    np.testing.assert_array_equal(NBMixture.load(path).predict(adata), mixture.predict(adata))


def test_what_was_saved_without_names_has_none(fitted, tmp_path):
    counts = COUNTS.toarray()
    counts[:, 3] = 0
    fitted = NBMixture(**EM).fit(counts)
    fitted.save(tmp_path / "a.ckpt")
    again = NBMixture.load(tmp_path / "a.ckpt")
    assert not hasattr(again, "feature_names_in_")
    np.testing.assert_array_equal(again.predict_proba(counts), fitted.predict_proba(counts))


@pytest.mark.parametrize("settings", [EM, AMORTIZED], ids=["em", "amortized"])
def test_train_applies_what_was_saved(settings, tmp_path):
    adata = annotated()
    adata.write_h5ad(tmp_path / "a.h5ad")
    mixture = NBMixture(**settings).fit(adata)
    mixture.save(tmp_path / "a.ckpt")
    run_here(
        tmp_path / "run",
        f"model={settings.get('model', 'em')}",
        "task=predict",
        f"ckpt_path={tmp_path}/a.ckpt",
        "data=h5ad",
        f"data.path={tmp_path}/a.h5ad",
        "evaluation.max_umap_cells=0",
    )
    result = ad.read_h5ad(tmp_path / "run" / "result.h5ad")
    np.testing.assert_allclose(result.obsm["X_nbmix"], mixture.predict_proba(adata), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(result.obs["nbmix_log_likelihood"], mixture.score_samples(adata), rtol=1e-7)
    doubt = mixture.doubt(adata)
    np.testing.assert_allclose(result.obs["nbmix_misfit"], doubt["misfit"], rtol=0, atol=1e-4)
    assert np.array_equal(result.obs["nbmix_second"].astype(int), doubt["second"])


def test_a_saved_fit_does_not_go_on_as_if_it_were_one_of_train(tmp_path):
    adata = annotated()
    adata.write_h5ad(tmp_path / "a.h5ad")
    NBMixture(2, start="kmeans").fit(adata).save(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="was fitted to other cells"):
        run_here(
            tmp_path / "run",
            "model.n_components=2",
            f"ckpt_path={tmp_path}/a.ckpt",
            "data=h5ad",
            f"data.path={tmp_path}/a.h5ad",
            "data.validation_share=0",
        )


@pytest.mark.parametrize("content", [b"garbage", {"state_dict": {}}], ids=["bytes", "torch"])
def test_files_that_are_no_checkpoint(content, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=r"path=.*a\.ckpt: is not a checkpoint of nbmix"):
        NBMixture.load(path)


def test_a_checkpoint_of_another_model(fitted, tmp_path):
    fitted.save(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content[SECTION]["model"] = "vaec"
    write_checkpoint(content, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="is of model=vaec; NBMixture has amortized, em"):
        NBMixture.load(tmp_path / "a.ckpt")


@pytest.mark.slow
@pytest.mark.skipif(not PBMC.exists(), reason="the shared data is not here")
def test_new_cells_of_sorted_populations():
    adata = ad.read_h5ad(PBMC)
    adata = adata[adata.obs["cell_type"].isin(MIXTURES["mix4"])]
    seen, new = adata[::2].copy(), adata[1::2].copy()
    mixture = NBMixture(4, start="kmeans").fit(seen)
    assert adjusted_rand_score(new.obs["cell_type"], mixture.predict(new)) > 0.95
    assert np.median(mixture.predict_proba(new).max(1)) > 0.99
