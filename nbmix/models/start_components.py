"""The components that a fit by minibatches begins at, and how all of its cells improve them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from nbmix.core.em_loop import run_em
from nbmix.core.mixture import E_STEPS_OF_GIVEN_COMPONENTS, Mixture
from nbmix.core.settings import MixtureSettings
from nbmix.data.module import CountsDataModule
from nbmix.starts.base import StartState, new_mixture, prepare

# of EM that begins at given responsibilities; from random ones the way is long
START_CELLS, START_FOLDS, START_ITERATIONS = 10_000, 5, 200

BLIND_ITERATIONS = E_STEPS_OF_GIVEN_COMPONENTS + 1  # after which no copy owes anything to its own fold

START_CELLS_OF_A_COMPONENT = 50.0  # where a draw holds fewer, all of its cells are taken


def start_components(start: StartState, data: CountsDataModule, settings: MixtureSettings) -> StartState:
    """A start with components, and with what cells say of their joins where they are to be joined.

    Where it has responsibilities of the training cells, cross-fitted EM begins at them, on some of the cells:
    a single M step would leave random ones alike, and gradients of minibatches do not part what is alike.
    Where it sees all cells, its folds are those of ``MixtureEM``: where EM ends may depend on them, and both
    models are to find the same. Of components that come without joins, a few iterations tell these.
    """
    if start.components is not None and (start.join_evidence is not None or not settings.is_joined):
        return start
    training = data.training_data
    if start.components is None:
        assert start.responsibilities is not None
        rows = start_cells(start.responsibilities, data.seed)
        given, iterations = start.responsibilities[rows], START_ITERATIONS
    else:
        rows = np.sort(np.random.default_rng(data.seed).permutation(training.n_cells)[:START_CELLS])
        given, iterations = None, BLIND_ITERATIONS
    seen = training.select_cells(rows).load()
    settings = replace(settings, folds=min(START_FOLDS, seen.n_cells))
    basis, batches = prepare(seen, settings.folds, data.fold_generator(), dtype=settings.torch_dtype)
    fitted = new_mixture(seen, settings, basis, start)
    run_em(fitted, batches, responsibilities=given, max_iterations=iterations)
    found = StartState.of(fitted, batches)
    if given is not None:
        return found
    offsets = found.offsets if start.offsets is None else start.offsets
    return start._replace(join_evidence=found.join_evidence, offsets=offsets)


def improved_on_all_cells(
    start: StartState, data: CountsDataModule, settings: MixtureSettings, n_iterations: int
) -> StartState:
    """Components of a start after some iterations of EM on all training cells, without folds.

    Where a start may have seen all cells, as there are no more than ``START_CELLS``, it stays as it is. One
    iteration costs a fraction of an epoch of minibatches, and brings components as far as many of these; most
    of its responsibilities are of cells that the start has not seen. With more of them components of few
    cells learn these by heart.
    """
    if data.training_rows.size <= START_CELLS or not n_iterations:
        return start
    n_origins, origin_cells = len(data.data.origin_names), data.training_origin_cells
    mixture = Mixture(data.data.n_genes, replace(settings, folds=1), n_origins)
    mixture.attach(data.basis, float(data.data.size_factors[data.training_rows].sum()), origin_cells)
    start.hand_to(mixture)
    cells = data.training_pass()
    run_em(mixture, cells if data.data.is_backed else list(cells), max_iterations=n_iterations)
    return StartState.of(mixture)._replace(join_evidence=start.join_evidence)


def start_cells(
    responsibilities: Tensor,
    seed: int,
    n_cells: int = START_CELLS,
    n_cells_of_a_component: float = START_CELLS_OF_A_COMPONENT,
) -> np.ndarray:
    """Sorted positions of the cells that EM sees: a random draw, and all of components that are rare in it.

    Args:
        responsibilities: (cells, K).
        seed: of the draw.
        n_cells: drawn at most.
        n_cells_of_a_component: a component with fewer in the draw is rare.
    """
    drawn = np.random.default_rng(seed).permutation(len(responsibilities))[:n_cells]
    rare = responsibilities[drawn].sum(0) < n_cells_of_a_component
    of_rare = responsibilities[:, rare].sum(1) > 0.5
    return np.union1d(drawn, np.flatnonzero(of_rare.numpy()))
