"""The run folder: result.h5ad, markers, pictures, the report, metrics.json."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nbmix.data.read import read_h5ad
from nbmix.output.pictures import (
    component_sizes,
    interactive_embedding,
    n_components,
    objective_trace,
    reliability,
    title_and_caption,
)
from nbmix.output.scores import score
from nbmix.output.writing import sparing, write_json, write_outcome, write_pictures, write_result
from nbmix.starts.choice import Choice
from nbmix.starts.random import DirichletStart
from tests.helpers.results import results_of
from tests.helpers.running import small_data


def test_result_file(results, tmp_path):
    write_result(results, tmp_path / "result.h5ad")
    data = small_data()
    adata = ad.read_h5ad(tmp_path / "result.h5ad")
    assert [p.name for p in tmp_path.iterdir()] == ["result.h5ad"]
    assert (data.counts != adata.X).nnz == 0
    assert adata.obs_names.tolist() == data.cell_names.tolist()
    assert adata.var_names.tolist() == data.gene_names.tolist()
    assert np.array_equal(adata.obsm["X_nbmix"], results.responsibilities)
    assert np.array_equal(adata.obs["nbmix"].astype(int), results.responsibilities.argmax(1))
    assert adata.obs["nbmix"].cat.categories.tolist() == ["0", "1"]
    assert np.array_equal(np.flatnonzero(adata.obs["nbmix_held_out"]), results.data.validation_rows)
    assert adata.obs["cell_type"].tolist() == data.labels.tolist()
    components = results.model.mixture.components()
    assert np.array_equal(adata.varm["nbmix_log_mean"].T, components.log_mean.numpy())
    assert np.array_equal(adata.varm["nbmix_log_inv_disp"].T, components.log_inv_disp.numpy())
    assert json.loads(adata.uns["nbmix"]["provenance"]) == {"config": {"seed": 0}}
    assert adata.uns["nbmix"]["objective"].tolist() == results.model.objective


def test_result_file_without_labels(unlabelled, tmp_path):
    write_result(unlabelled, tmp_path / "result.h5ad")
    assert "cell_type" not in ad.read_h5ad(tmp_path / "result.h5ad").obs


def annotated_file(path):
    """Counts as an analyst keeps them, with names that nbmix would give among them."""
    data = small_data()
    n_cells, n_genes = data.counts.shape
    adata = ad.AnnData(
        data.counts,
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical(data.labels, ["component1", "component0"]),
                "donor": pd.array(["x", None] * (n_cells // 2), dtype="string"),
                "nbmix": "stale",
                "nbmix_old": 1.0,
            },
            index=data.cell_names,
        ),
        var=pd.DataFrame({"symbol": [f"S{j}" for j in range(n_genes)]}, index=data.gene_names),
        obsm={"X_pca": np.arange(2.0 * n_cells).reshape(-1, 2), "X_nbmix": np.ones((n_cells, 1))},
        varm={"PCs": np.arange(n_genes)[:, None]},
        layers={"log": data.counts.log1p()},
        uns={"cell_type_colors": np.array(["#000000", "#ffffff"]), "log1p": {"base": 2.0}},
    )
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path)
    return adata


@pytest.mark.parametrize("backed", [False, True])
def test_result_file_passes_on_what_the_input_holds(tmp_path, backed):
    given = annotated_file(tmp_path / "input.h5ad")
    data = read_h5ad(tmp_path / "input.h5ad", backed=backed)
    made = results_of(data, start=DirichletStart())
    write_result(made, tmp_path / "result.h5ad")
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert result.obs["donor"].astype(object).where(result.obs["donor"].notna(), None).tolist() == [
        *(["x", None] * (data.n_cells // 2))
    ]
    assert result.obs["cell_type"].cat.categories.tolist() == ["component1", "component0"]
    assert result.obs["cell_type"].tolist() == given.obs["cell_type"].tolist()
    assert "nbmix_old" not in result.obs
    assert np.array_equal(result.obs["nbmix"].astype(int), made.assignments)
    assert np.array_equal(result.obsm["X_nbmix"], made.responsibilities)
    assert np.array_equal(result.obsm["X_pca"], given.obsm["X_pca"])
    assert result.var["symbol"].tolist() == given.var.loc[result.var_names, "symbol"].tolist()
    assert np.array_equal(result.varm["PCs"], given[:, result.var_names].varm["PCs"])
    assert sorted(result.uns) == ["cell_type_colors", "nbmix"]
    assert not result.layers
    assert (result.X is None) == backed


def test_a_fit_is_not_lost_to_what_cannot_be_written(results, tmp_path, caplog):
    data = results.data.data
    obs = pd.DataFrame({"strange": [object()] * data.n_cells, "kept": 1}, index=data.cell_names)
    annotations = ad.AnnData(obs=obs, var=pd.DataFrame(index=data.gene_names), uns={"a": (1, 2), "b": "kept"})
    annotations.var["_index"] = 0  # as Seurat's converters have it
    made = results_of(replace(data, annotations=annotations))
    write_result(made, tmp_path / "result.h5ad")
    assert "goes without some of the input's fields (" in caplog.text
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert "strange" not in result.obs and "_index" not in result.var
    assert (result.obs["kept"] == 1).all()
    assert sorted(result.uns) == ["b", "nbmix"]
    assert np.array_equal(result.obsm["X_nbmix"], made.responsibilities)
    assert result.obs["cell_type"].tolist() == data.labels.tolist()


def test_pictures(results, unlabelled, tmp_path):
    """Each is a file of its name; one that has nothing to show is left out."""
    pictures = (objective_trace, reliability, n_components, component_sizes)
    for of, names in (
        (results, ["objective_trace", "reliability", "component_sizes"]),
        (unlabelled, ["objective_trace", "component_sizes"]),
    ):
        folder = tmp_path / str(len(names))
        made = write_pictures(of, pictures, folder)
        assert {file.name for file in folder.iterdir()} == {f"{name}.png" for name in names}
        files = [folder / f"{name}.png" for name in names]
        assert [picture.content for picture in made] == [file.read_bytes() for file in files]
        assert made[-1].title == "Group sizes"
        assert made[-1].caption == title_and_caption(component_sizes)[1]
        assert [picture.section for picture in made] == ["diagnostics"] * (len(names) - 1) + ["groups"]
        assert imread(folder / "objective_trace.png").shape[:2] == (600, 960)  # 4 x 6.4 inches


@pytest.mark.leaves_out
def test_a_picture_that_fails_is_left_out(results, tmp_path, caplog):
    def donors(results):
        raise KeyError("donor")

    def bad_text(results):
        figure = Figure()
        figure.text(0, 0, "$\\no$")
        return figure

    def elsewhere(results):
        return Figure()

    elsewhere.section = "attic"
    drawn = (donors, component_sizes, bad_text, elsewhere)
    write_outcome(results, score(results), tmp_path, pictures=drawn)
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first == "picture donors is left out: KeyError: 'donor'"
    assert second.startswith("picture bad_text is left out: ValueError:") and "\n" not in second
    assert third.startswith(
        "picture elsewhere is left out: InputError: section='attic': must be one of cells, "
    )
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["component_sizes.png"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 1
    assert (tmp_path / "metrics.json").is_file()


def test_cells_that_the_browser_draws_have_no_file(results, tmp_path):
    made = replace(results, max_umap_cells=0)
    (picture,) = write_pictures(made, [interactive_embedding], tmp_path / "figures")
    assert picture.is_interactive and picture.section == "cells"
    assert not list((tmp_path / "figures").iterdir())


def test_loggers_get_the_pictures(results, tmp_path):
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    write_pictures(results, [objective_trace, n_components], tmp_path / "figures", [logger])
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["objective_trace"]


def test_the_whole_outcome(tmp_path):
    results = results_of(small_data())
    metrics = score(results) | {"seconds": 1.5}
    curve = np.array([-12.0, -10.0, -9.5])
    results.model.choice = Choice(np.array([1, 2, 3]), curve, np.array([0.0, 0.1, 0.1]), 2, None).plain
    write_outcome(results, metrics, tmp_path, pictures=(n_components, objective_trace))
    assert {p.name for p in tmp_path.iterdir()} == {
        *("metrics.json", "n_components.csv", "joins.csv", "result.h5ad", "markers.csv", "figures"),
        "separations.csv",
        "report.html",
    }
    tried = pd.read_csv(tmp_path / "n_components.csv")
    assert tried["gain"].tolist()[1:] == [2.0, 0.5]
    assert tried["recommended"].tolist() == [False, True, False]
    assert pd.read_csv(tmp_path / "joins.csv")["n_groups"].tolist() == [2]
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    table = pd.read_csv(tmp_path / "markers.csv", dtype={"gene": str})
    data, markers = small_data(), results.markers
    assert len(table) == 2 * data.n_genes
    for k in (0, 1):
        rows = table[table["component"] == k].set_index("gene").loc[data.gene_names]
        np.testing.assert_allclose(rows["ln_fc_rest"], markers.from_rest.log_fold_change[k], rtol=1e-4)
        np.testing.assert_allclose(rows["share"], markers.share[k], rtol=1e-4)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert page.index("<h3>Number of components</h3>") < page.index("<h3>Objective</h3>")
    for words in ("Nats per cell at every iteration", "config.seed", table["gene"][0], str(data.labels[0])):
        assert words in page


def test_outcome_without_labels_and_with_one_component(unlabelled, tmp_path):
    write_outcome(unlabelled, score(unlabelled), tmp_path / "a")
    alone = results_of(small_data(), n_components=1, folds=1)
    write_outcome(alone, score(alone), tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert "nbmix report" in (folder / "report.html").read_text(encoding="utf-8")
        assert list((folder / "figures").iterdir()) == []
    assert pd.read_csv(tmp_path / "b" / "markers.csv")["ln_fc_rest"].isna().all()


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"b": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"b": 1}


@pytest.mark.leaves_out
def test_what_fails_is_left_out(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("of an earlier fit")
    with sparing(tmp_path / "a.csv"):
        raise ValueError("odd\nname")
    assert "a.csv is left out: ValueError: odd name" in caplog.text
    assert not (tmp_path / "a.csv").exists()
    with pytest.raises(OSError), sparing(tmp_path / "b.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")
