"""The run folder: result.h5ad, markers, pictures, the report, metrics.json."""

from __future__ import annotations

import errno
import json
import re
import warnings
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
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
from nbmix.output.writing import (
    sparing,
    write_json,
    write_markers,
    write_outcome,
    write_pictures,
    write_result,
)
from nbmix.starts.choice import Choice
from nbmix.starts.random import DirichletStart
from tests.helpers.hdf5 import content
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
    """A file as an analyst keeps it: normalised X, counts in a layer and in raw, silent genes, graphs."""
    data = small_data()
    n_cells, n_genes = data.counts.shape
    counts = sp.hstack([sp.csr_matrix((n_cells, 1)), data.counts], format="csr").astype(np.float32)
    genes = ["silent", *data.gene_names]
    raw = ad.AnnData(counts, var=pd.DataFrame({"n": np.arange(n_genes + 1)}, index=genes))
    adata = ad.AnnData(
        counts.log1p()[:, :-10].toarray().astype(np.float64),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical(data.labels, ["component1", "component0"]),
                "donor": pd.array(["x", None] * (n_cells // 2), dtype="string"),
                "nbmix": "stale",
                "nbmix_groups": "stale",
                "nbmix_old": np.float32(1.0),
                "text": pd.array(["y"] * n_cells, dtype="string"),
                "batch": np.arange(n_cells, dtype=np.int8),
            },
            index=pd.Index(data.cell_names, name="barcode"),
        ),
        var=pd.DataFrame({"symbol": [f"S{j}" for j in range(n_genes - 9)]}, index=genes[:-10]),
        obsm={"X_pca": np.arange(2.0 * n_cells).reshape(-1, 2), "X_nbmix": np.ones((n_cells, 1))},
        varm={"PCs": np.arange(n_genes - 9)[:, None], "nbmix_batch_offsets": np.ones((n_genes - 9, 2))},
        layers={"counts": counts[:, :-10].astype(np.int32), "csc": counts[:, :-10].tocsc()},
        obsp={"distances": sp.random(n_cells, n_cells, 0.1, format="csr", random_state=0)},
        varp={"loadings": np.eye(n_genes - 9)},
        uns={
            "cell_type_colors": np.array(["#000000", "#ffffff"]),
            "log1p": {"base": 2.0},
            "nbmix_groups": {"stale": "0+1"},
        },
    )
    adata.raw = raw
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path, compression="gzip", convert_strings_to_categoricals=False)
    return adata


OURS = re.compile(r"(obs|obsm|varm|uns|raw/varm)/(X_)?nbmix(?!_old)|obsm/X_umap|uns/rank_genes_groups")


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("layer", ["counts", "raw.X"])
def test_result_file_is_the_one_that_was_given(layer, backed, tmp_path):
    given = annotated_file(tmp_path / "input.h5ad")
    data = read_h5ad(tmp_path / "input.h5ad", layer=layer, backed=backed)
    made = results_of(data, start=DirichletStart())
    write_result(made, tmp_path / "result.h5ad")
    before, after = (content(tmp_path / name) for name in ("input.h5ad", "result.h5ad"))
    theirs = {name for name in before if not OURS.match(name)} - {"obs"}  # which lists its columns
    assert {name: before[name] for name in theirs} == {name: after[name] for name in theirs}
    assert {name for name in after if not OURS.match(name)} - {"obs"} == theirs
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert list(result.obs)[:5] == ["cell_type", "donor", "nbmix_old", "text", "batch"]
    assert result.obs.index.name == "barcode"
    assert np.array_equal(result.obs["nbmix"].astype(int), made.assignments)
    assert np.array_equal(result.obsm["X_nbmix"], made.responsibilities)
    assert "nbmix_batch_offsets" not in result.varm
    assert "nbmix_groups" not in result.uns
    mean = pd.DataFrame(made.profiles.log_mean.T.numpy(), index=data.gene_names)
    assert np.array_equal(result.varm["nbmix_log_mean"], mean.reindex(given.var_names), equal_nan=True)
    assert np.isnan(result.varm["nbmix_log_mean"][0]).all()  # of the silent gene
    if layer == "raw.X":
        of_raw = result.raw.varm["nbmix_log_mean"]
        assert np.array_equal(of_raw, mean.reindex(given.raw.var_names), equal_nan=True)


@pytest.mark.parametrize("backed", [False, True])
def test_result_file_of_picked_cells(backed, tmp_path):
    given = annotated_file(tmp_path / "input.h5ad")
    settings = {"layer": "counts", "populations": ["component1"], "subsample": 20}
    data = read_h5ad(tmp_path / "input.h5ad", backed=backed, **settings)
    made = results_of(data, start=DirichletStart())
    write_result(made, tmp_path / "result.h5ad")
    result, wanted = ad.read_h5ad(tmp_path / "result.h5ad"), given[data.cell_names]
    assert result.obs_names.tolist() == wanted.obs_names.tolist()
    assert result.obs["donor"].isna().tolist() == wanted.obs["donor"].isna().tolist()
    assert result.obs["text"].dtype == "string" and result.obs["text"].tolist() == ["y"] * 20
    assert result.obs["batch"].dtype == np.int8
    assert result.X.dtype == np.float64 and np.array_equal(result.X, wanted.X)
    assert result.layers["counts"].dtype == np.int32 and result.layers["csc"].format == "csc"
    for one, other in (
        (result.layers["counts"], wanted.layers["counts"]),
        (result.layers["csc"], wanted.layers["csc"]),
        (result.raw.X, wanted.raw.X),
        (result.obsp["distances"], wanted.obsp["distances"]),
    ):
        assert one.shape == other.shape and (one != other).nnz == 0
    before, after = (content(tmp_path / name) for name in ("input.h5ad", "result.h5ad"))
    of_genes = [n for n in before if n.startswith(("var/", "varp", "raw/var", "uns", "varm/PCs"))]
    of_genes = [n for n in of_genes if not OURS.match(n)]
    assert of_genes and all(before[name] == after[name] for name in of_genes)
    assert np.array_equal(result.obs["nbmix"].astype(int), made.assignments)


@pytest.mark.parametrize("layer", [None, "raw.X"])
def test_names_that_are_repeated_and_files_of_other_programs(layer, tmp_path):
    """Genes are told apart by their places; lists of columns can be of bytes."""
    data, path = small_data(), tmp_path / "input.h5ad"
    names = [*data.gene_names[:-1], data.gene_names[0]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Variable|Observation) names are not unique")
        obs = pd.DataFrame({"a": np.ones(60)}, index=["cell"] * 60)
        adata = ad.AnnData(data.counts, var=pd.DataFrame(index=names), obs=obs)
        adata.raw = adata
        adata[:, 1:5].write_h5ad(path) if layer else adata.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            file["obs"].attrs["column-order"] = np.array([b"a"])
            del file["raw/varm"], file["varm"]
        made = results_of(read_h5ad(path, layer=layer), start=DirichletStart())
        write_result(made, tmp_path / "result.h5ad")
        result = ad.read_h5ad(tmp_path / "result.h5ad")
    mean = made.profiles.log_mean.T.numpy()
    assert list(result.obs)[:2] == ["a", "nbmix"]
    assert np.array_equal(result.varm["nbmix_log_mean"], mean[1:5] if layer else mean)
    assert ("nbmix_log_mean" in result.raw.varm) == (layer is not None)


def test_what_scanpy_looks_for_is_there_unless_it_was(tmp_path):
    """And is replaced by that of the next fit, where it is ours."""
    path = tmp_path / "input.h5ad"
    data = small_data()
    ad.AnnData(data.counts, var=pd.DataFrame(index=data.gene_names)).write_h5ad(path)
    first = results_of(read_h5ad(path), start=DirichletStart())
    write_result(first, tmp_path / "first.h5ad", embed=True)
    result = ad.read_h5ad(tmp_path / "first.h5ad")
    assert np.array_equal(result.obsm["X_umap"], first.embedding.coordinates)
    assert np.array_equal(result.obsm["X_nbmix_umap"], result.obsm["X_umap"])
    assert result.uns["rank_genes_groups"]["params"]["groupby"] == "nbmix"
    second = results_of(read_h5ad(tmp_path / "first.h5ad"), folds=1, n_components=3, max_umap_cells=0)
    write_result(second, tmp_path / "second.h5ad", embed=True)
    result = ad.read_h5ad(tmp_path / "second.h5ad")
    assert {"X_nbmix", "X_nbmix_pca"} == set(result.obsm)
    filled = tuple(sorted(set(result.obs["nbmix"])))
    assert result.uns["rank_genes_groups"]["names"].dtype.names == filled
    result.obsm["X_umap"] = theirs = np.ones((60, 2))
    result.uns["rank_genes_groups"] = {"params": {"method": "t-test"}}
    result.write_h5ad(path)
    write_result(results_of(read_h5ad(path)), tmp_path / "third.h5ad", embed=True)
    result = ad.read_h5ad(tmp_path / "third.h5ad")
    assert np.array_equal(result.obsm["X_umap"], theirs) and "X_nbmix_umap" in result.obsm
    assert result.uns["rank_genes_groups"] == {"params": {"method": "t-test"}}
    assert "names" in result.uns["nbmix_rank_genes_groups"]


def test_a_file_that_has_changed_or_cannot_be_added_to_costs_no_fit(tmp_path, caplog):
    annotated_file(tmp_path / "input.h5ad")
    made = results_of(read_h5ad(tmp_path / "input.h5ad", layer="counts"), start=DirichletStart())
    (tmp_path / "input.h5ad").unlink()
    write_result(made, tmp_path / "result.h5ad")
    assert "result.h5ad: goes without what else" in caplog.text and "has changed since" in caplog.text
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert (made.data.data.counts != result.X).nnz == 0
    assert np.array_equal(result.obsm["X_nbmix"], made.responsibilities)
    assert result.obs["cell_type"].cat.categories.tolist() == ["component1", "component0"]


def test_what_cannot_be_picked_from_is_left_out(tmp_path, caplog):
    annotated_file(tmp_path / "input.h5ad")
    with h5py.File(tmp_path / "input.h5ad", "r+") as file:
        del file["obsp/distances/indptr"]
        file["obsm/all"] = h5py.SoftLink("/obsm")
    data = read_h5ad(tmp_path / "input.h5ad", layer="counts", subsample=20)
    write_result(results_of(data, start=DirichletStart()), tmp_path / "result.h5ad")
    assert "obsp['distances'] cannot be copied, and is left out" in caplog.text
    assert "obsm['all'] cannot be copied, and is left out" in caplog.text
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert "X_pca" in result.obsm and not result.obsp


def test_a_fit_is_not_lost_to_what_cannot_be_written(results, tmp_path, caplog):
    data = results.data.data
    obs = pd.DataFrame({"strange": [object()] * data.n_cells, "kept": 1}, index=data.cell_names)
    annotations = ad.AnnData(obs=obs, var=pd.DataFrame(index=data.gene_names))
    annotations.var["_index"] = 0  # as Seurat's converters have it
    made = results_of(replace(data, annotations=annotations))
    write_result(made, tmp_path / "result.h5ad")
    assert "goes without some of the input's fields (" in caplog.text
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert "strange" not in result.obs and "_index" not in result.var
    assert (result.obs["kept"] == 1).all()
    assert np.array_equal(result.obsm["X_nbmix"], made.responsibilities)
    assert result.obs["cell_type"].tolist() == data.labels.tolist()


def test_markers_are_written_as_pandas_does(tmp_path):
    """Names that need quotes, numbers of all sizes, and those that are missing."""
    genes = ["a", "b,c", 'd "e"', "f\ng", "nan", ""] * 4_000  # more rows than are written at once
    share = np.random.default_rng(0).random(len(genes))
    change = np.tile([0.0, -1.5, 123456.7, 1e-300, np.inf, -np.inf], 4_000)
    table = pd.DataFrame({"rank": range(len(genes)), "gene": genes, "share": share, "ln_fc_rest": change})
    table.loc[::7, "share"] = np.nan
    write_markers(table, tmp_path / "markers.csv")
    table.to_csv(tmp_path / "expected.csv", index=False, float_format="%.5g")
    assert (tmp_path / "markers.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()


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
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["objective_trace"]
    (image,) = events.Images("objective_trace")
    assert image.encoded_image_string == (tmp_path / "figures/objective_trace.png").read_bytes()
    assert (image.height, image.width) == (600, 960)


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
