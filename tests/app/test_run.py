"""The whole story in this process: the run folder, new cells, going on, bad input."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hydra.errors import InstantiationException

from nbmix.app.command import is_bad_input, one_line
from nbmix.core.batch import FLOAT32_NODE_NATS
from nbmix.errors import InputError
from tests.helpers.running import NO_PICTURES, ROOT, TINY, run_here, small_data

PBMC = ROOT / "../shared/data/pbmc_facs.h5ad"
MODELS = pytest.mark.parametrize("model", ["em", "amortized"])
SHORT = (*TINY, "trainer.max_epochs=3")


def write(path, counts, *, labels=True, genes=None, **layers):
    """An .h5ad file of (cells, genes) counts; its setting. ``labels``: (cells,), True for any, or None."""
    n_cells, n_genes = counts.shape
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n_cells)])
    if labels is True:
        labels = [f"t{i % 2}" for i in range(n_cells)]
    if labels is not None:
        obs["cell_type"] = pd.Categorical(labels)
    var = pd.DataFrame(index=genes if genes is not None else [f"g{j}" for j in range(n_genes)])
    ad.AnnData(counts, obs=obs, var=var, layers=layers).write_h5ad(path)
    return f"data.path={path}"


@pytest.fixture(scope="module", params=["em", "amortized"])
def finished(request, tmp_path_factory):
    """(folder, metrics, model) of a finished run."""
    folder = tmp_path_factory.mktemp(request.param)
    metrics = run_here(folder, *TINY, f"model={request.param}", "trainer.max_epochs=4")
    return folder, metrics, request.param


def test_run_folder(finished):
    folder, metrics, _ = finished
    assert {p.name for p in folder.iterdir()} == {
        "joins.csv",
        "separations.csv",
        "metrics.json",
        "result.h5ad",
        "markers.csv",
        "report.html",
        "checkpoints",
        "figures",
        "csv",
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    n_pictures = 15 if metrics["n_components_used"] == 2 else 14  # one group has no separation
    assert len(list((folder / "figures").glob("*.png"))) == n_pictures
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    logged = pd.read_csv(folder / "csv" / "metrics.csv")
    assert {"objective", "heldout_log_likelihood", "label/cross_entropy", "iteration"} <= set(logged)
    assert logged["iteration"].dropna().tolist() == [1, 2, 3, 4]


@MODELS
@pytest.mark.parametrize("start", ["random", "kmeans"])
def test_a_number_of_components_that_is_left_open(model, start, tmp_path):
    open_k = ("model.n_components=2-4", "model.components_per_group=1")
    metrics = run_here(tmp_path, *SHORT, f"model={model}", f"start={start}", *open_k)
    tried = pd.read_csv(tmp_path / "n_components.csv").set_index("n_components")
    assert tried["recommended"].idxmax() == metrics["n_components"]
    assert 2 <= metrics["n_components"] <= 4
    assert (tmp_path / "figures" / "n_components.png").exists()


@pytest.mark.parametrize("model", ["em", "amortized"])
def test_a_number_of_groups_that_is_left_open(model, tmp_path, capsys):
    metrics = run_here(tmp_path, *SHORT, f"model={model}", "start=kmeans", "model.n_components=2-4")
    assert metrics["n_components"] == metrics["n_groups_with_gaps"] == 2
    assert metrics["n_components_fitted"] == 5  # 54 cells
    assert "\n2 groups: the next join, to 1, is of a gap (p = " in capsys.readouterr().out
    assert not (tmp_path / "n_components.csv").exists()
    assert (tmp_path / "separations.csv").exists()
    both_have_cells = metrics["n_components_used"] == 2
    assert (tmp_path / "figures" / "separations.png").exists() == both_have_cells


@pytest.mark.parametrize(("wanted", "n_groups"), [("2", 2), ("1", 1), ("auto", 2)])
def test_a_prediction_of_another_number_of_groups(wanted, n_groups, finished, tmp_path):
    folder, _, model = finished
    path = f"ckpt_path={folder}/checkpoints/last.ckpt"
    again = run_here(
        tmp_path, *TINY, f"model={model}", "task=predict", path, f"n_groups={wanted}", NO_PICTURES
    )
    assert again["n_components"] == n_groups
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert result.obsm["X_nbmix"].shape == (60, n_groups)
    members = [set(map(int, group.split("+"))) for group in result.uns["nbmix"]["groups"].values()]
    q = result.obsm["X_nbmix_components"]
    np.testing.assert_allclose(result.obsm["X_nbmix"][:, 0], q[:, list(members[0])].sum(1), rtol=1e-6)


def test_numbers_of_groups_that_are_not_to_be_had(finished, tmp_path):
    folder, _, model = finished
    predict = (*TINY, f"model={model}", "task=predict", f"ckpt_path={folder}/checkpoints/last.ckpt")
    with pytest.raises(InputError, match=r"^n_groups=30: this fit can be cut into 1 to \d groups; give"):
        run_here(tmp_path, *predict, "n_groups=30")
    with pytest.raises(InputError, match=r"^n_groups=3: is for task=predict; a fit has model.n_components"):
        run_here(tmp_path, *TINY, "n_groups=3")


def test_metrics(finished):
    _, metrics, model = finished
    assert metrics["model"] == model
    assert metrics["n_cells"] == 60
    assert metrics["seconds"] > 0
    assert metrics["n_iterations"] == 4
    assert ("elbo" in metrics) == (model == "amortized")
    assert all(metrics[name] < 0 for name in ("log_likelihood", "heldout_log_likelihood"))
    if model == "amortized":
        assert metrics["elbo"] <= metrics["log_likelihood"]


def test_checkpoints_load_without_executing_anything(finished):
    folder, _, model = finished
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["nbmix"]["model"] == model
    assert content["epoch"] == 3


def test_a_checkpoint_predicts_what_the_fit_said(finished, tmp_path):
    folder, metrics, model = finished
    again = run_here(
        tmp_path, *TINY, f"model={model}", "task=predict", f"ckpt_path={folder}/checkpoints/last.ckpt"
    )
    assert again["n_genes_missing"] == 0
    # the EM fit scores a training cell by components that have not seen it; its log likelihood is of all,
    # and as close as float32 products are, where a prediction is exact
    assert again["log_likelihood"] == pytest.approx(metrics["log_likelihood"], abs=FLOAT32_NODE_NATS)
    if model == "amortized":
        mine, theirs = (ad.read_h5ad(f / "result.h5ad").obsm["X_nbmix"] for f in (folder, tmp_path))
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)


def test_a_checkpoint_of_float64_predicts_what_the_fit_said_to_the_last_digits(tmp_path):
    settings = (*TINY, NO_PICTURES, "model.dtype=float64", "trainer.max_epochs=3")
    metrics = run_here(tmp_path / "fit", *settings)
    checkpoint = f"ckpt_path={tmp_path}/fit/checkpoints/last.ckpt"
    again = run_here(tmp_path / "again", *settings, "task=predict", checkpoint)
    assert again["log_likelihood"] == pytest.approx(metrics["log_likelihood"], rel=1e-9)


def test_new_cells_with_other_genes_in_another_order(finished, tmp_path, caplog):
    folder, _, model = finished
    data = small_data()
    source = ad.read_h5ad(folder / "result.h5ad")
    order = np.random.default_rng(0).permutation(source.n_vars)
    kept = order[:-5]
    new = source.X[10:40][:, kept]
    extra = sp.csr_matrix(np.ones((30, 2), dtype=np.float32))
    setting = write(
        tmp_path / "new.h5ad",
        sp.hstack([new, extra], format="csr"),
        genes=[*source.var_names[kept], "extra0", "extra1"],
    )
    last = f"ckpt_path={folder}/checkpoints/last.ckpt"
    predict = ("task=predict", f"model={model}", last, "data=h5ad", "evaluation.max_umap_cells=0")
    metrics = run_here(tmp_path / "a", *predict, setting)
    assert metrics["n_genes_missing"] == 5
    assert metrics["n_genes"] == source.n_vars - 5
    assert metrics["n_cells"] == 30 < data.n_cells
    assert f"5 of its {source.n_vars} genes are missing in the data" in caplog.text
    # the order of the genes is nothing
    back = np.argsort(kept)
    setting = write(tmp_path / "sorted.h5ad", sp.hstack([new[:, back], extra], format="csr"),
                    genes=[*source.var_names[kept][back], "extra0", "extra1"])  # fmt: skip
    again = run_here(tmp_path / "b", *predict, setting, NO_PICTURES)
    assert again["log_likelihood"] == pytest.approx(metrics["log_likelihood"], rel=1e-12)
    first, second = (ad.read_h5ad(tmp_path / run / "result.h5ad") for run in "ab")
    np.testing.assert_allclose(first.obsm["X_nbmix"], second.obsm["X_nbmix"], rtol=1e-6, atol=1e-9)


@MODELS
@pytest.mark.parametrize("same_folder", [True, False])
def test_going_on_gives_what_one_run_gives(model, same_folder, tmp_path):
    settings = (*TINY, NO_PICTURES, f"model={model}", "data.batch_size=20", "model.weights=learned")
    if model == "amortized":
        settings += ("model.encoder_epochs=2",)
    whole = run_here(tmp_path / "whole", *settings, "trainer.max_epochs=5")
    run_here(tmp_path / "part", *settings, "trainer.max_epochs=3")
    folder = tmp_path / ("part" if same_folder else "rest")
    last = f"ckpt_path={tmp_path}/part/checkpoints/last.ckpt"
    rest = run_here(folder, *settings, "trainer.max_epochs=5", last)
    assert {k: v for k, v in rest.items() if k != "seconds"} == {
        k: v for k, v in whole.items() if k != "seconds"
    }
    mine, theirs = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (tmp_path / "whole", folder)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "settings",
    [
        ("model.folds=1", "model.pseudo_cells=0"),
        ("m_step@model.m_step=gradient", "model.m_step.num_epochs=10"),
        ("model.weights=uniform", "model.dtype=float64"),
        ("model.n_components=1",),
        ("model.n_components=9",),
        ("data.validation_share=0", "start=topics", "start.use=means"),
        ("start=random", "start.n_starts=2", "start.n_axes=0"),
        ("model=amortized", "model.train_components=false"),
        ("model=amortized", "data.validation_share=0", "start=subsample", "start.n_cells=30"),
        ("model=amortized", "start=first_batch", "start.n_cells=20"),
        ("model=amortized", "start=topics", "model.n_components=1"),
    ],
    ids=" ".join,
)
def test_settings(settings, tmp_path):
    metrics = run_here(tmp_path, *SHORT, *settings)
    assert np.isfinite(metrics["log_likelihood"])
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


@MODELS
def test_starts_from_files(model, tmp_path, finished):
    q = np.random.default_rng(0).dirichlet([1, 1], 60)
    np.save(tmp_path / "q.npy", q)
    mean = ad.read_h5ad(finished[0] / "result.h5ad").varm["nbmix_log_mean"].T
    np.save(tmp_path / "m.npy", np.exp(mean))
    for start, path in (
        ("responsibilities", tmp_path / "q.npy"),
        ("means", tmp_path / "m.npy"),
        ("checkpoint", finished[0] / "checkpoints" / "best.ckpt"),
    ):
        settings = (*SHORT, NO_PICTURES, f"model={model}", f"start={start}", f"start.path={path}")
        metrics = run_here(tmp_path / start, *settings)
        assert np.isfinite(metrics["log_likelihood"]), start


@MODELS
def test_given_weights_unlabelled_and_empty_cells(model, tmp_path, caplog):
    data = small_data()
    counts = data.counts.toarray()
    counts[7] = 0
    path = tmp_path / "a.h5ad"
    write(path, sp.csr_matrix(counts), labels=None)
    adata = ad.read_h5ad(path)
    adata.obsm["prior"] = np.tile([0.3, 0.7], (60, 1))
    adata.write_h5ad(path)
    given = ("data=h5ad", f"data.path={path}", "data.prior_key=prior", "model.weights=given")
    metrics = run_here(
        tmp_path / "run",
        f"model={model}",
        "model.n_components=2",
        "trainer.max_epochs=2",
        "start=kmeans",
        "evaluation.max_umap_cells=0",
        *given,
    )
    assert metrics["n_empty_cells"] == 1
    assert "1 of 60 cells have no counts; they are kept" in caplog.text
    assert "ari" not in metrics
    q = ad.read_h5ad(tmp_path / "run" / "result.h5ad").obsm["X_nbmix"]
    np.testing.assert_allclose(q[7], [0.3, 0.7], rtol=1e-12)


@MODELS
def test_labels_change_nothing_of_a_fit(model, tmp_path):
    """Right labels, shuffled ones and none: the same bits, from the default start."""
    data = small_data(40, 50)
    shuffled = np.random.default_rng(0).permutation(data.labels)
    fits, states, results = {}, {}, {}
    for name, labels in (("right", data.labels), ("shuffled", shuffled), ("none", None)):
        setting = write(tmp_path / f"{name}.h5ad", data.counts, labels=labels)
        settings = ("data=h5ad", setting, f"model={model}", "model.n_components=2", "trainer.max_epochs=10")
        settings += ("model.lr=0.05",) if model == "amortized" else ()  # a step an epoch
        metrics = run_here(tmp_path / name, *settings, NO_PICTURES)
        fits[name] = {k: v for k, v in metrics.items() if k != "seconds"}
        states[name] = torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        results[name] = ad.read_h5ad(tmp_path / name / "result.h5ad")
    assert fits["right"]["ari"] > fits["shuffled"]["ari"]
    assert fits["none"].items() <= fits["right"].items() & fits["shuffled"].items()
    for name in ("right", "shuffled"):
        assert all(map(torch.equal, states[name].values(), states["none"].values()))
        found, unlabelled = results[name], results["none"]
        np.testing.assert_array_equal(found.obsm["X_nbmix"], unlabelled.obsm["X_nbmix"])
        for column in ("nbmix", "nbmix_probability", "nbmix_log_likelihood"):
            assert found.obs[column].equals(unlabelled.obs[column])


def refused(folder, *overrides):
    """The line that the command line would print."""
    with pytest.raises((InputError, InstantiationException)) as error:
        run_here(folder, *overrides)
    assert is_bad_input(error.value)
    line = one_line(error.value)
    assert "\n" not in line
    assert not folder.joinpath("metrics.json").exists()
    return line


@pytest.mark.parametrize(
    "value, words",
    [
        (-1, "negative values"),
        (0.5, "fractional values"),
        (np.nan, "NaN"),
        (np.inf, "infinite values"),
    ],
)
def test_values_that_are_no_counts(value, words, tmp_path):
    counts = np.ones((6, 4), dtype=np.float32)
    counts[2, 3] = value
    line = refused(tmp_path / "run", "data=h5ad", write(tmp_path / "a.h5ad", counts, raw=np.ones((6, 4))))
    assert words in line
    assert "cell 'c2', gene 'g3'" in line
    if value == 0.5:
        assert "set data.layer=raw" in line


@pytest.mark.parametrize(
    "settings, words",
    [
        (("data.label_key=other",), "obs has no column 'other'; set data.label_key"),
        (("data.layer=other",), "no layer 'other'; set data.layer"),
        (("data.size_factor_key=other",), "obs has no column 'other'; set data.size_factor_key"),
        (("data.min_counts=1000",), "set a lower data.min_counts"),
        (("data.min_counts=0",), "data.min_counts=0: must be 1 or more"),
        (("model.n_components=7",), "model.n_components=7: there are only 6 cells to fit"),
        (("model.n_components=0",), "model.n_components=0: must be 1 or more"),
        (("model.n_components=3", "start=labels"), "there are 2 labels; set model.n_components=2"),
        (("model.folds=7",), "model.folds=7: there are only 6 cells to fit"),
        (("task=show",), "task=show: choose fit or predict"),
        (("task=predict",), "task=predict: set ckpt_path"),
        (("ckpt_path=no.ckpt", "start=kmeans"), "ckpt_path=no.ckpt: there is no such file"),
        (("trainer.gpus=64",), "trainer.gpus=64: GPUs that torch finds on this machine"),
        (("model.weights=given",), "set data.prior_key"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings_that_do_not_fit_the_data(settings, words, tmp_path):
    counts = np.random.default_rng(0).poisson(3.0, (6, 4)).astype(np.float32)
    setting = write(tmp_path / "a.h5ad", counts)
    assert words in refused(tmp_path / "run", "data=h5ad", setting, "model.n_components=2", *settings)


def test_files_that_are_no_data(tmp_path):
    text = tmp_path / "text.h5ad"
    text.write_text("gene,cell\n1,2\n")
    assert "is a table of text" in refused(tmp_path / "a", "data=h5ad", f"data.path={text}")
    missing = f"data.path={tmp_path}/none.h5ad"
    assert "no such file" in refused(tmp_path / "b", "data=h5ad", missing)
    assert "data.path is not set" in refused(tmp_path / "c", "data=h5ad")


def test_too_many_gpus_are_refused_before_the_data_is_read(tmp_path):
    line = refused(tmp_path, "trainer.gpus=64", "data=h5ad", "data.path=/no/such.h5ad")
    assert line.startswith("trainer.gpus=64")


def test_checkpoints_that_do_not_fit(finished, tmp_path):
    folder, _, model = finished
    last = f"ckpt_path={folder}/checkpoints/last.ckpt"
    other = "amortized" if model == "em" else "em"
    assert f"is of model={model}" in refused(tmp_path / "a", *TINY, f"model={other}", last)
    assert f"set model={model}" in refused(tmp_path / "b", *TINY, f"model={other}", last, "task=predict")
    mine = (*TINY, f"model={model}")
    assert "genes that are not" in refused(tmp_path / "c", *mine, last, "data.n_genes=40")
    words = refused(tmp_path / "d", *mine, last, "model.n_components=3")
    assert "was fitted with model.n_components=2" in words
    counts = np.random.default_rng(0).poisson(3.0, (6, 4)).astype(np.float32)
    setting = write(tmp_path / "other.h5ad", counts, genes=list("wxyz"))
    predict = (f"model={model}", "task=predict", last, "data=h5ad", setting)
    assert "was fitted to other genes" in refused(tmp_path / "e", *predict)
    garbage = tmp_path / "garbage.ckpt"
    garbage.write_bytes(b"garbage")
    assert "is not a checkpoint of nbmix" in refused(tmp_path / "f", *mine, f"ckpt_path={garbage}")


@pytest.mark.slow
@pytest.mark.skipif(not PBMC.is_file(), reason="no real counts at ../shared/data")
def test_sorted_immune_cells(tmp_path):
    settings = ("data=mix2", f"data.path={PBMC}", "data.subsample=300", "data.min_counts=20", "start=kmeans")
    metrics = run_here(tmp_path, *settings, "model.n_components=2", "evaluation.max_umap_cells=0")
    assert metrics["ari"] > 0.97
    assert metrics["converged"] is True


def test_what_is_said_of_a_cell_does_not_depend_on_the_others(finished, tmp_path):
    folder, _, model = finished
    source = ad.read_h5ad(folder / "result.h5ad")
    predict = (
        "task=predict",
        f"model={model}",
        f"ckpt_path={folder}/checkpoints/last.ckpt",
        "data=h5ad",
        "evaluation.max_umap_cells=0",
    )
    names = source.var_names
    run_here(tmp_path / "all", *predict, NO_PICTURES, write(tmp_path / "all.h5ad", source.X, genes=names))
    run_here(tmp_path / "two", *predict, write(tmp_path / "two.h5ad", source.X[:2], genes=names))
    every, two = (ad.read_h5ad(tmp_path / run / "result.h5ad") for run in ("all", "two"))
    np.testing.assert_allclose(
        two.obs["nbmix_log_likelihood"], every.obs["nbmix_log_likelihood"][:2], rtol=1e-6
    )
    np.testing.assert_allclose(two.obsm["X_nbmix"], every.obsm["X_nbmix"][:2], rtol=1e-4, atol=1e-9)


def test_size_factors_in_another_unit_are_noticed(tmp_path, caplog):
    run_here(tmp_path / "fit", *TINY, NO_PICTURES, "trainer.max_epochs=1")
    source = ad.read_h5ad(tmp_path / "fit" / "result.h5ad")
    source.obs["relative"] = source.obs["nbmix_size_factor"] / source.obs["nbmix_size_factor"].mean()
    source.write_h5ad(tmp_path / "new.h5ad")
    run_here(
        tmp_path / "new",
        "task=predict",
        f"ckpt_path={tmp_path}/fit/checkpoints/last.ckpt",
        "data=h5ad",
        f"data.path={tmp_path}/new.h5ad",
        "data.size_factor_key=relative",
        NO_PICTURES,
    )
    assert "set size_factor_key to the same kind of column as in the fit" in caplog.text


@MODELS
def test_a_finished_fit_that_goes_on_changes_nothing(model, tmp_path):
    settings = (*TINY, NO_PICTURES, f"model={model}", "trainer.max_epochs=30")
    if model == "amortized":
        settings = (*settings, "trainer.max_epochs=2")
    whole = run_here(tmp_path / "whole", *settings)
    last = f"ckpt_path={tmp_path}/whole/checkpoints/last.ckpt"
    again = run_here(tmp_path / "again", *settings, last)
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_going_on_with_other_cells_is_refused(tmp_path):
    run_here(tmp_path / "first", *TINY, NO_PICTURES, "trainer.max_epochs=2")
    with pytest.raises(InputError, match="other cells, or to another split of them"):
        run_here(
            tmp_path / "second",
            *TINY,
            "data.n_cells=50",
            f"ckpt_path={tmp_path / 'first/checkpoints/last.ckpt'}",
        )
