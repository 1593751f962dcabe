"""Counts that stay in their file are the counts that are read: cells, genes, batches, fits, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from nbmix.core.mixture import Mixture
from nbmix.core.settings import MixtureSettings
from nbmix.data.backed import BackedCounts
from nbmix.data.counts import CountData
from nbmix.data.module import CountsDataModule
from nbmix.data.read import read_h5ad
from nbmix.errors import InputError
from nbmix.starts.base import new_mixture, one_hot
from tests.helpers.running import NO_PICTURES, run_here, small_data

N_CELLS, N_GENES = 90, 60
EMPTY = [0, 17, 18, 19, 44, N_CELLS - 1]
SLABS = pytest.mark.parametrize("slab_nonzeros", [1, 7, 50, 200, 10**9])
RUN = ("data=h5ad", "model.n_components=2", "trainer.max_epochs=3", "evaluation.max_umap_cells=0")


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def make_adata(n_cells: int = N_CELLS, n_genes: int = N_GENES, seed: int = 0) -> ad.AnnData:
    """Two populations at unequal depths; some cells are empty, some genes rare, one cell is full."""
    rng = np.random.default_rng(seed)
    group = np.arange(n_cells) % 3
    mean = rng.lognormal(-1, 1, (3, n_genes))
    depth = rng.lognormal(0, 0.5, n_cells)
    x = rng.poisson(depth[:, None] * mean[group]).astype(np.float32)
    x[[cell for cell in EMPTY if cell < n_cells]] = 0
    x[:, 3] = 0  # silent everywhere
    x[group == 0, 5] = 0  # silent in population a
    x[5] += 300 * (np.arange(n_genes) != 3)  # no zero but one
    return ad.AnnData(
        sp.csr_matrix(x),
        obs=pd.DataFrame(
            {"cell_type": np.array(["a", "b", "c"])[group], "depth": depth},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)]),
        layers={"double": sp.csr_matrix(2 * x)},
        obsm={"weights": rng.dirichlet(np.ones(2), n_cells)},
    )


@pytest.fixture
def adata() -> ad.AnnData:
    return make_adata()


@pytest.fixture
def path(adata, tmp_path) -> Path:
    path = tmp_path / "counts.h5ad"
    adata.write_h5ad(path)
    return path


def both(path: Path, slab_nonzeros: int = 10**9, **settings) -> tuple[CountData, CountData]:
    """Backed, and in memory."""
    backed = read_h5ad(path, backed=True, slab_nonzeros=slab_nonzeros, **settings)
    memory = read_h5ad(path, **settings)
    assert backed.is_backed
    assert isinstance(backed.counts, BackedCounts)
    assert not memory.is_backed
    return backed, memory


def assert_same(backed: CountData, memory: CountData) -> None:
    """All that belongs to the cells and genes, and the counts once they are read."""
    assert (backed.n_cells, backed.n_genes) == (memory.n_cells, memory.n_genes)
    loaded = backed.load()
    assert not loaded.is_backed
    assert loaded.load() is loaded
    for field in ("data", "indices", "indptr"):
        there, expected = getattr(loaded.counts, field), getattr(memory.counts, field)
        assert there.dtype == expected.dtype
        np.testing.assert_array_equal(there, expected)
    assert loaded.counts.shape == memory.counts.shape
    assert loaded.counts.has_canonical_format
    for field in ("size_factors", "cell_names", "gene_names", "labels", "prior", "positions", "n_whole"):
        np.testing.assert_array_equal(getattr(backed, field), getattr(memory, field))
        np.testing.assert_array_equal(getattr(loaded, field), getattr(memory, field))
    np.testing.assert_array_equal(backed.empty_cells, memory.empty_cells)
    totals = np.asarray(memory.counts.sum(axis=0, dtype=np.float64)).ravel()
    np.testing.assert_array_equal(backed.counts.gene_totals(), totals)


# Reading


@SLABS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_counts": 40},
        {"min_counts": 0},
        {"populations": ["a"]},
        {"populations": ["c", "b"], "subsample": 25, "seed": 3},
        {"subsample": 1, "seed": 2},
        {"subsample": N_CELLS},
        {"layer": "double", "size_factor_key": "depth", "prior_key": "weights", "label_key": None},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
def test_backed_is_what_is_read(path, settings, slab_nonzeros):
    assert_same(*both(path, slab_nonzeros, **settings))


def test_gene_filter_and_totals(adata, path):
    data = read_h5ad(path, backed=True, populations=["a"])
    assert "gene3" not in data.gene_names
    assert "gene5" not in data.gene_names
    np.testing.assert_array_equal(data.size_factors, np.asarray(adata.X.sum(1)).ravel()[::3])


def test_empty_cells_are_kept_and_warned_of(path, caplog):
    data = read_h5ad(path, backed=True)
    assert np.flatnonzero(data.empty_cells).tolist() == EMPTY
    assert f"{len(EMPTY)} of {N_CELLS} cells have no counts" in caplog.text


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("kind", [np.float64, np.int64, np.uint16])
def test_types_and_compression(adata, tmp_path, kind, compression):
    adata.X = adata.X.astype(kind)
    adata.write_h5ad(tmp_path / "other.h5ad", compression=compression)
    assert_same(*both(tmp_path / "other.h5ad"))


def test_entries_of_a_row_in_any_order(adata, tmp_path):
    path = tmp_path / "unsorted.h5ad"
    adata.write_h5ad(path)
    x = adata.X
    order = np.concatenate([np.arange(b, e)[::-1] for b, e in zip(x.indptr, x.indptr[1:], strict=False)])
    with h5py.File(path, "r+") as file:
        file["X/data"][:] = x.data[order]
        file["X/indices"][:] = x.indices[order]
    assert_same(*both(path, min_counts=0))


# Slabs


@SLABS
def test_slabs_hold_every_cell_once_in_order(path, slab_nonzeros):
    for settings in ({}, {"populations": ["b"]}):
        data = read_h5ad(path, backed=True, slab_nonzeros=slab_nonzeros, **settings)
        plan = data.counts.plan()
        assert all(part.size for part in plan)
        np.testing.assert_array_equal(np.concatenate(plan), np.arange(data.n_cells))
        for positions, slab in zip(plan, data.counts.slabs(), strict=True):
            np.testing.assert_array_equal(slab.rows, positions)
            assert slab.counts.shape == (positions.size, data.n_genes)


def test_slabs_are_bounded_but_for_one_row(adata, path):
    largest = int(np.diff(adata.X.indptr).max())
    assert largest > 30  # one row alone is more than a slab
    data = read_h5ad(path, backed=True, slab_nonzeros=30)
    sizes = [slab.counts.nnz for slab in data.counts.slabs()]
    assert len(sizes) > 5
    assert max(sizes) < 30 + largest


def test_a_slab_boundary_on_empty_rows(tmp_path):
    x = np.zeros((9, 4), np.float32)
    x[[1, 4, 6]] = [1, 2, 3, 4]  # 4 nonzeros each: a slab of 4 ends where empty rows follow
    path = tmp_path / "gaps.h5ad"
    ad.AnnData(sp.csr_matrix(x)).write_h5ad(path)
    for slab_nonzeros in (1, 3, 4, 5, 8, 12, 13):
        assert_same(*both(path, slab_nonzeros))
        assert_same(*(data.select_cells(np.array([0, 2, 3, 4, 8])) for data in both(path, slab_nonzeros)))


def test_cells_without_a_count_alone(path):
    for slab_nonzeros in (1, 10**9):
        assert_same(*(data.select_cells(np.array(EMPTY)) for data in both(path, slab_nonzeros)))


# Picking


@pytest.mark.parametrize("slab_nonzeros", [20, 10**9])
def test_select_cells_and_genes(path, slab_nonzeros):
    rng = np.random.default_rng(1)
    backed, memory = both(path, slab_nonzeros)
    cells = np.sort(rng.choice(memory.n_cells, 40, replace=False))
    again = np.sort(rng.choice(40, 11, replace=False))
    genes, fewer = rng.permutation(memory.n_genes)[:50], rng.permutation(50)[:45]
    steps = (
        lambda data: data.select_cells(cells),
        lambda data: data.select_genes(genes),
        lambda data: data.select_cells(again),
        lambda data: data.select_genes(fewer),
    )
    for step in steps:
        backed, memory = step(backed), step(memory)
        assert backed.is_backed
        assert_same(backed, memory)


def test_cells_that_a_choice_of_genes_leaves_empty(path):
    backed, memory = both(path)
    backed, memory = (data.select_genes(np.array([0, 1])) for data in (backed, memory))
    assert memory.empty_cells.sum() > len(EMPTY)
    np.testing.assert_array_equal(backed.empty_cells, memory.empty_cells)


@pytest.mark.parametrize("rows", [[3, 2], [0, 5, 5], [7, 8, 1]])
def test_cells_can_only_be_picked_in_ascending_order(path, rows):
    with pytest.raises(ValueError, match="ascending"):
        read_h5ad(path, backed=True).select_cells(np.array(rows))


# Fits


def module(data: CountData, rank: int = 0, world_size: int = 1, **settings) -> CountsDataModule:
    made = CountsDataModule(lambda: data, **settings)
    made.setup()
    made.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return made


def folds_of(made: CountsDataModule) -> dict[int, int]:
    return {int(row): batch.fold for batch in made.train_dataloader() for row in batch.rows}


def em(made: CountsDataModule, settings: MixtureSettings, iterations: int = 6) -> tuple[Mixture, list[float]]:
    """Nats per training cell before each M step but the first, and last those per held-out cell."""
    data = made.data
    mixture = new_mixture(data, settings, made.basis)
    q = one_hot(np.unique(data.labels, return_inverse=True)[1] % settings.n_components, settings.n_components)
    trace = []
    for iteration in range(iterations):
        mixture.reset_statistics()
        total, n_cells = 0.0, 0
        for batch in made.train_dataloader():
            own = q[batch.rows]
            if iteration:
                own, log_likelihood = mixture.posterior(batch)
                total += float(log_likelihood.sum())
            n_cells += batch.n_cells
            mixture.collect(batch, own)
        penalty = mixture.m_step(warm=iteration > 0, whole=True)
        if iteration:
            trace.append((total + penalty) / n_cells)
    held_out = [mixture.posterior(batch).log_likelihood for batch in made.val_dataloader()]
    if held_out:
        trace.append(float(sum(part.sum() for part in held_out)) / sum(part.numel() for part in held_out))
    return mixture, trace


@pytest.mark.parametrize("slab_nonzeros", [300, 10**9])
@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("weights", ["learned", "given"])
def test_em_is_that_in_memory(path, folds, slab_nonzeros, weights):
    settings = MixtureSettings(2, folds, "auto", weights, dtype="float64")
    data = both(path, slab_nonzeros, prior_key="weights")
    backed, memory = (module(one, folds=folds, batch_size=16) for one in data)
    np.testing.assert_array_equal(backed.training_rows, memory.training_rows)
    np.testing.assert_array_equal(backed.validation_rows, memory.validation_rows)
    assert folds_of(backed) == folds_of(memory)
    assert backed.fingerprint == memory.fingerprint
    (mixture, trace), (expected, expected_trace) = em(backed, settings), em(memory, settings)
    assert trace[:-1] == pytest.approx(expected_trace[:-1], rel=1e-9)
    # other batches have other nodes, to NODE_TOLERANCE, which moves dispersions where they are flat
    assert trace[-1] == pytest.approx(expected_trace[-1], rel=1e-7)
    np.testing.assert_allclose(
        mixture.components().log_mean.numpy(), expected.components().log_mean.numpy(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("slab_nonzeros", [300, 10**9])
def test_every_epoch_gives_the_same_batches(path, slab_nonzeros):
    data = read_h5ad(path, backed=True, slab_nonzeros=slab_nonzeros, prior_key="weights")
    made = module(data, folds=3, batch_size=16)
    first, second = list(made.train_dataloader()), list(made.train_dataloader())
    for one, other in zip(first, second, strict=True):
        assert one.fold == other.fold
        assert one.rows.tolist() == other.rows.tolist()
        assert one.pairs.indices.tolist() == other.pairs.indices.tolist()
        assert len(one.rows) <= 16


def test_batches_hold_what_the_file_holds(path):
    backed, memory = both(path, 300, prior_key="weights")
    made = module(backed, folds=3, batch_size=16)
    codes = np.unique(memory.labels, return_inverse=True)[1]
    for loader in (made.train_dataloader(), made.val_dataloader(), made.predict_dataloader()):
        for batch in loader:
            rows, levels = batch.rows.numpy(), made.basis.levels
            of_pair = batch.used[batch.pairs.indices]
            parts = (levels.count[of_pair].numpy(), levels.gene[of_pair].numpy(), batch.pairs.indptr.numpy())
            held = sp.csr_matrix(parts, shape=(rows.size, memory.n_genes))
            np.testing.assert_array_equal(held.toarray(), memory.counts[rows].toarray())
            np.testing.assert_array_equal(batch.size_factors.numpy(), memory.size_factors[rows])
            np.testing.assert_array_equal(batch.labels.numpy(), codes[rows])
            np.testing.assert_allclose(np.exp(batch.log_prior.numpy()), memory.prior[rows], rtol=1e-12)


@pytest.mark.parametrize("slab_nonzeros", [40, 300, 10**9])
@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_hold_every_cell_once(path, folds, world_size, slab_nonzeros):
    data = read_h5ad(path, backed=True, slab_nonzeros=slab_nonzeros)
    ranks = [module(data, rank, world_size, folds=folds, batch_size=7) for rank in range(world_size)]
    whole = ranks[0]
    for loader, expected in (
        ("train_dataloader", whole.training_rows),
        ("val_dataloader", whole.validation_rows),
        ("predict_dataloader", np.arange(data.n_cells)),
    ):
        batches = [list(getattr(rank, loader)()) for rank in ranks]
        seen = np.concatenate([batch.rows.numpy() for rank in batches for batch in rank])
        np.testing.assert_array_equal(np.sort(seen), expected, err_msg=loader)
        assert len({len(rank) for rank in batches}) == 1, loader
    folded = {}
    for rank in ranks:
        folded |= folds_of(rank)
    assert folded == folds_of(module(data, folds=folds, batch_size=7))


# The command


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small .h5ad file of a simulation."""
    data = small_data(150, 60, 2)
    path = tmp_path_factory.mktemp("source") / "counts.h5ad"
    obs = pd.DataFrame({"cell_type": pd.Categorical(data.labels)}, index=data.cell_names)
    ad.AnnData(data.counts, obs=obs, var=pd.DataFrame(index=data.gene_names)).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """Run folders and metrics of the same fit, backed and in memory."""
    runs = {}
    for backed in ("true", "false"):
        folder = tmp_path_factory.mktemp("run")
        settings = (*RUN, f"data.path={source}", f"data.backed={backed}", "+data.slab_nonzeros=1500")
        runs[backed == "true"] = folder, run_here(folder, *settings, "model.dtype=float64")
    return runs


def assert_same_metrics(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in found.keys() - {"seconds"}:
        wanted = expected[name]
        if isinstance(wanted, float):
            wanted = pytest.approx(wanted, rel=1e-7, abs=1e-9)
        assert found[name] == wanted, name


def test_a_run_is_that_in_memory(finished):
    (folder, metrics), (memory, expected) = finished[True], finished[False]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert_same_metrics(metrics, expected)
    result, wanted = (ad.read_h5ad(f / "result.h5ad") for f in (folder, memory))
    np.testing.assert_allclose(result.obsm["X_nbmix"], wanted.obsm["X_nbmix"], rtol=1e-6, atol=1e-9)
    assert result.obs_names.equals(wanted.obs_names)
    assert result.var_names.equals(wanted.var_names)
    for column in ("nbmix", "nbmix_held_out", "nbmix_size_factor", "cell_type"):
        assert result.obs[column].tolist() == wanted.obs[column].tolist(), column
    pictures = [{p.name for p in (f / "figures").iterdir()} for f in (folder, memory)]
    assert pictures[0] == pictures[1]


def test_prediction(finished, source, tmp_path):
    folder = finished[False][0]
    last = f"ckpt_path={folder}/checkpoints/last.ckpt"
    runs = [
        run_here(
            tmp_path / backed, *RUN, "task=predict", last, f"data.path={source}", f"data.backed={backed}"
        )
        for backed in ("true", "false")
    ]
    assert_same_metrics(*runs)
    assert (tmp_path / "true" / "result.h5ad").exists()


def test_prediction_of_other_genes_in_another_order(finished, tmp_path):
    folder = finished[False][0]
    source = ad.read_h5ad(folder / "result.h5ad")
    order = np.random.default_rng(0).permutation(source.n_vars)[:-5]
    extra = sp.csr_matrix(np.ones((40, 2), dtype=np.float32))
    new = ad.AnnData(
        sp.hstack([source.X[10:50][:, order], extra], format="csr"),
        var=pd.DataFrame(index=[*source.var_names[order], "extra0", "extra1"]),
    )
    new.write_h5ad(tmp_path / "new.h5ad")
    predict = (*RUN, NO_PICTURES, "task=predict", f"ckpt_path={folder}/checkpoints/last.ckpt")
    runs = [
        run_here(tmp_path / backed, *predict, f"data.path={tmp_path / 'new.h5ad'}", f"data.backed={backed}")
        for backed in ("true", "false")
    ]
    assert runs[0]["n_genes_missing"] == 5
    assert_same_metrics(*runs)


# Bad input


def reads_badly(adata: ad.AnnData, folder: Path, **settings) -> str:
    path = folder / "bad.h5ad"
    adata.write_h5ad(path)
    with pytest.raises(InputError) as error:
        read_h5ad(path, backed=True, **settings)
    message = one_line(error)
    assert message.startswith(f"data.path={path}: ")
    return message.removeprefix(f"data.path={path}: ")


@pytest.mark.parametrize("form", ["dense", "csc"])
def test_only_csr_can_stay_in_the_file(adata, tmp_path, form):
    adata.X = adata.X.toarray() if form == "dense" else adata.X.tocsc()
    message = reads_badly(adata, tmp_path)
    assert message.startswith("X is not a CSR matrix, which data.backed=true needs")
    # a layer that is one will do
    assert_same(*both(tmp_path / "bad.h5ad", layer="double"))


def test_a_layer_that_is_not_there(adata, tmp_path):
    assert "layers/raw" in reads_badly(adata, tmp_path, layer="raw")


def test_no_counts_at_all(adata, tmp_path):
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    assert reads_badly(adata, tmp_path) == "every cell is empty; nbmix needs raw counts"


def test_explicit_zeros_and_repeated_entries(adata, tmp_path):
    x = adata.X.copy()
    x.data[100] = 0
    adata.X = x
    assert reads_badly(adata, tmp_path).startswith("X stores zeros or repeated entries")
    x = make_adata().X
    row = int(np.argmax(np.diff(x.indptr) > 1))
    x.indices[x.indptr[row] + 1] = x.indices[x.indptr[row]]
    adata.X = sp.csr_matrix((x.data, x.indices, x.indptr), shape=x.shape)
    assert reads_badly(adata, tmp_path).startswith("X stores zeros or repeated entries")


@pytest.mark.parametrize("slab_nonzeros", [50, 10**9])
@pytest.mark.parametrize(
    ("value", "kind", "what"),
    [
        (0.5, np.float32, "fractional values (first: 0.5"),
        (-1.0, np.float32, "negative values (first: -1.0"),
        (np.nan, np.float32, "NaN"),
        (np.inf, np.float32, "infinite values"),
        (2.0**25, np.float64, "values above 2**24"),
        (2.0**24 + 1, np.float64, "values above 2**24"),
        (1 + 1e-9, np.float64, "fractional values"),
    ],
)
def test_what_is_no_count(adata, tmp_path, value, kind, what, slab_nonzeros):
    x = adata.X.astype(kind)
    at = x.nnz - 10
    x.data[at] = value
    adata.X = x
    message = reads_badly(adata, tmp_path, slab_nonzeros=slab_nonzeros)
    assert message.startswith(f"X holds {what}")
    row = int(np.searchsorted(x.indptr, at, side="right")) - 1
    assert f"at cell 'cell{row}', gene 'gene{x.indices[at]}'" in message


@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_a_file_with_damage_inside(path, part):
    with h5py.File(path, "r+") as file:
        del file[f"X/{part}"]
    with pytest.raises(InputError, match=r"cannot be read \(.*\); the file is damaged") as error:
        read_h5ad(path, backed=True)
    one_line(error)


@pytest.mark.parametrize("choice", ["start=kmeans", "start=topics"])
def test_what_needs_the_counts_in_memory(source, tmp_path, choice):
    with pytest.raises(Exception, match=r"data\.backed=true: ") as error:
        run_here(tmp_path, *RUN, f"data.path={source}", "data.backed=true", choice)
    assert isinstance(error.value, InputError)
    one_line(error)


@pytest.mark.parametrize("start", ["labels", "subsample"])
def test_starts_that_do_not(source, tmp_path, start):
    settings = (*RUN, NO_PICTURES, f"data.path={source}", f"start={start}", "model.dtype=float64")
    runs = [run_here(tmp_path / b, *settings, f"data.backed={b}") for b in ("true", "false")]
    assert_same_metrics(*runs)
