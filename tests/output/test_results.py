"""What follows from a model and its predictions."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import torch

from nbmix.core.batch import CellBatch
from nbmix.core.likelihood import component_log_likelihood
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.read import read_h5ad
from nbmix.evaluation.doubt import other_components
from nbmix.evaluation.embedding import embed
from nbmix.evaluation.markers import find_markers
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.vaec import VAEC
from nbmix.output.results import Results, named_markers
from nbmix.starts.random import DirichletStart
from nbmix.training.predict import doubt_here, predict_here
from tests.helpers.results import results_of
from tests.helpers.running import fit, small_data


def test_the_inverse_temperature_is_of_cells_that_were_not_seen():
    data = small_data()
    seen = results_of(data, epochs=1, folds=1, validation_share=0.0)
    assert seen.inverse_temperature is None
    assert seen.calibrated is None
    assert np.array_equal(seen.probabilities, seen.responsibilities.max(1))
    held_out = results_of(data, epochs=1, folds=1, validation_share=0.5)
    assert 0 < held_out.inverse_temperature <= 1
    encoder = AmortizedMixture(data.gene_names, n_components=2, encoder_epochs=1)
    module, cells = fit(encoder, data, epochs=1)
    assert Results(module, encoder, cells).inverse_temperature is None


def statistics_of(data, basis, q):
    batch = CellBatch.build(data.counts, data.size_factors, basis)
    return SufficientStatistics.collect(batch, basis, q, torch.float64)


def assert_same(statistics, wanted):
    for mine, theirs in zip(statistics.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_statistics_are_of_all_cells_by_their_responsibilities(results):
    assert_same(
        results.statistics,
        statistics_of(small_data(), results.data.basis, results.cells.responsibilities),
    )


def test_statistics_of_minibatches_and_of_counts_on_disk(tmp_path):
    data = small_data()
    model = AmortizedMixture(data.gene_names, n_components=2, encoder_epochs=1)
    module, cells = fit(model, data, epochs=2, batch_size=16)
    amortized = Results(module, model, cells)
    assert_same(amortized.statistics, statistics_of(data, module.basis, cells.responsibilities))

    ad.AnnData(
        data.counts, pd.DataFrame(index=data.cell_names), pd.DataFrame(index=data.gene_names)
    ).write_h5ad(tmp_path / "counts.h5ad")
    backed = read_h5ad(tmp_path / "counts.h5ad", backed=True)
    of_disk = results_of(backed, start=DirichletStart())
    assert_same(
        of_disk.statistics,
        statistics_of(backed.load(), of_disk.data.basis, of_disk.cells.responsibilities),
    )


def test_markers_depend_on_the_statistics_alone(results):
    wanted = find_markers(results.statistics, results.data.basis, results.total_size)
    torch.testing.assert_close(results.markers.log_mean, wanted.log_mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results.markers.standard_error, wanted.standard_error, rtol=1e-3, atol=1e-3)


def test_shown_cells_are_in_memory_and_in_the_plane(results):
    data = small_data()
    assert results.shown_rows.tolist() == list(range(60))
    assert (results.shown_cells.counts != data.counts).nnz == 0
    pca = Results(results.data, results.model, results.cells, max_umap_cells=59)  # 60 are too many
    assert pca.embedding.name == "PCA"
    np.testing.assert_array_equal(
        pca.embedding.coordinates, embed(data.counts, data.size_factors, max_umap_cells=0).coordinates
    )


def test_named_markers_have_symbols_beside_the_names_where_there_are_any(results):
    assert "symbol" not in named_markers(results)
    data = results.data.data
    symbols = np.array([f"S{name}" for name in data.gene_names])
    table = named_markers(results_of(replace(small_data(), gene_symbols=symbols)))
    assert list(table)[:4] == ["component", "rank", "gene", "symbol"]
    assert (table["symbol"] == "S" + table["gene"]).all()


def test_doubt_is_of_copies_that_have_not_seen_a_cell():
    results = results_of(small_data(), validation_share=0.0)
    mixture, folds = results.model.mixture, results.data.cell_folds
    assert set(folds.tolist()) == {0, 1, 2}
    data = small_data()
    for fold in (0, 1, 2):
        rows = np.flatnonzero(folds == fold)
        others = other_components(mixture.components(fold), mixture.log_weights.data[fold])
        both = [
            component_log_likelihood(data.counts[rows], data.size_factors[rows], *some)
            for some in (others, mixture.components(fold))
        ]
        pi = mixture.log_weights.data[fold]
        halves = torch.logsumexp(both[0][:, 1:] + pi, 1)
        want = torch.logaddexp(both[0][:, 0], halves) - np.log(2) - torch.logsumexp(both[1] + pi, 1)
        np.testing.assert_allclose(results.doubt.misfit[rows], want, rtol=0, atol=0.02)  # float32 products


def test_doubt_of_minibatches_of_counts_on_disk_and_without_likelihoods(tmp_path):
    data = small_data()
    model = AmortizedMixture(data.gene_names, n_components=2, encoder_epochs=1)
    amortized = Results(*fit_of(model, data))
    assert np.isfinite(amortized.doubt.misfit).all()
    alone = doubt_here(model, data, predict_here(model, data))
    np.testing.assert_allclose(amortized.doubt.misfit, alone.misfit, rtol=0, atol=0.02)

    ad.AnnData(
        data.counts, pd.DataFrame(index=data.cell_names), pd.DataFrame(index=data.gene_names)
    ).write_h5ad(tmp_path / "counts.h5ad")
    backed = read_h5ad(tmp_path / "counts.h5ad", backed=True)
    of_disk, of_memory = (results_of(cells, start=DirichletStart()) for cells in (backed, data))
    np.testing.assert_allclose(of_disk.doubt.misfit, of_memory.doubt.misfit, rtol=0, atol=0.02)

    deep = VAEC(data.gene_names, n_components=2)
    unknown = Results(*fit_of(deep, data)).doubt
    assert np.isnan(unknown.misfit).all()
    assert not unknown.fits_no_group.any()
    assert np.isfinite(unknown.margin).all()


def fit_of(model, data):
    module, cells = fit(model, data, epochs=1, batch_size=16)
    return module, model, cells
