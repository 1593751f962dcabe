"""Results of fits of two epochs."""

from __future__ import annotations

from typing import Any

from nbmix.data.counts import CountData
from nbmix.evaluation.embedding import MOST_UMAP_CELLS
from nbmix.models.mixture_em import MixtureEM
from nbmix.output.results import Results
from tests.helpers.running import fit


def results_of(data: CountData, start: Any = None, epochs: int = 2, **settings: Any) -> Results:
    """Of EM with two components and three folds, or other settings; those of batches by their names."""
    batches = {name: settings.pop(name) for name in ("validation_share",) if name in settings}
    most = settings.pop("max_umap_cells", MOST_UMAP_CELLS)
    model = MixtureEM(data.gene_names, **({"n_components": 2, "folds": 3} | settings))
    module, cells = fit(model, data, epochs=epochs, start=start, **batches)
    return Results(module, model, cells, {"config": {"seed": 0}}, most)
