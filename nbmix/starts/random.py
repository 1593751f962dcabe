"""Random starts: a search on a part of the cells, ranked by held-out likelihood and blind to labels.

The search differs from the fit in three ways. Its model lets cells vary along an axis that components share
(``nbmix.core.factor``), for without it the programmes within a kind of cell compete with the kinds. It begins
with more components than wanted and takes them away one by one, always the one that is missed least once the
others have followed, so that no kind is lost to a poor optimum. And it sees the most variable genes alone.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from nbmix.core.declared import Setting, checked
from nbmix.core.em_loop import StoppingRule, run_em
from nbmix.core.kernels.threads import side_by_side
from nbmix.core.m_step import NewtonMStep
from nbmix.core.settings import MixtureSettings
from nbmix.data.counts import CountData
from nbmix.starts.base import StartState, choose_cells, new_mixture, prepare, random_responsibilities
from nbmix.starts.search import Search, most_variable_genes, total_log_likelihood

log = logging.getLogger(__name__)

LEAST_SURPLUS = 4  # components; a rare kind gets none of a few more while a large one is cut in parts

CELLS_A_COMPONENT = 10  # at least, of those a search begins with

FIRST_ITERATIONS = 5  # with the surplus components

GOING_ON = 0.5  # share of the runs, after these; what follows costs three times as much

ITERATIONS_A_REMOVAL = 1  # in a search, which goes on at its end

ITERATIONS_A_STEP = 3  # in a path, whose every step is to be judged

LAST_ITERATIONS = 10

REFINE_ITERATIONS = 4  # of the mixture itself; the rest is for all cells


@checked("start")
@dataclass(frozen=True)
class RandomStart:
    """Several short runs from random beginnings; the best one by held-out likelihood is finished.

    Runs begin at one run of k-means on principal components from random centres, or at responsibilities drawn
    uniformly from the simplex. After a few iterations the better half goes on (successive halving; Jamieson &
    Talwalkar 2016). A cell is scored by the copy of the components that has not seen it.

    Where component weights are given, all runs begin at random responsibilities, with as many components as
    are wanted; else with LEAST_SURPLUS more at least, unless ``surplus`` is 0.
    """

    n_starts: Annotated[int, Setting("runs from different beginnings", least=1)] = 4
    random_every: Annotated[
        int,
        Setting(
            "one run in so many begins at random responsibilities, the others at k-means; 1: all; 0: none",
            least=0,
        ),
    ] = 4
    surplus: Annotated[
        float,
        Setting(
            "extra components at first, as a share of those wanted; removed one by one", least=0, most=10
        ),
    ] = 0.5
    n_axes: Annotated[
        int,
        Setting("directions in which cells of all components vary; each triples the time", least=0, most=3),
    ] = 1
    max_cells: Annotated[int, Setting("cells that the search sees", least=1)] = 2000
    max_genes: Annotated[int, Setting("genes that the search sees, the most variable ones", least=1)] = 2000
    refine_cells: Annotated[
        int, Setting("cells that the result is refined on, where the data hold twice as many", least=1)
    ] = 10_000
    folds: Annotated[int, Setting("folds of the search, which is always cross-fitted", least=2)] = 3

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        n_components = settings.n_components
        if n_components == 1:
            return StartState(torch.ones(data.n_cells, 1, dtype=torch.float64))
        seen = choose_cells(data, self.max_cells, generator)
        return self._take_to_all(seen, self._search(seen, settings, generator), data, settings, generator)

    def path(
        self, data: CountData, settings: MixtureSettings, most: int, generator: np.random.Generator
    ) -> tuple[CountData, dict[int, Tensor]]:
        """The search for every number of components from ``most`` down to 1, taken away one by one.

        Returns:
            The cells that it saw, and (cells, K) ln pi_k + ln p(x_i | k) for each K, cross-fitted and by the
            better of two runs.
        """
        seen = choose_cells(data, self.max_cells, generator)
        search = self._over_genes(seen, False, generator)
        found: dict[int, Tensor] = {}
        for begin in (search.by_k_means, search.at_random):
            run = search.run(begin(most, generator), FIRST_ITERATIONS)
            for n_components in range(most, 0, -1):
                run = search.without_least_missed(run, n_components, ITERATIONS_A_STEP)
                if n_components not in found or run.score > total_log_likelihood(found[n_components]):
                    found[n_components] = run.component_joint
        return seen, found

    def start_from(
        self,
        seen: CountData,
        joint: Tensor,
        data: CountData,
        settings: MixtureSettings,
        generator: np.random.Generator,
    ) -> StartState:
        """The start that a ``path`` found: ``joint`` of the cells that it saw."""
        return self._take_to_all(seen, torch.softmax(joint, 1), data, settings, generator)

    def _take_to_all(
        self,
        seen: CountData,
        q: Tensor,
        data: CountData,
        settings: MixtureSettings,
        generator: np.random.Generator,
    ) -> StartState:
        """Responsibilities of the cells that the search saw, or where these are not all, components."""
        if seen.n_cells == data.n_cells:
            return StartState(q)
        settings = replace(
            settings, folds=min(self.folds, max(2, seen.n_cells)), pseudo_cells="auto", m_step=NewtonMStep()
        )
        found = _iterate(seen, settings, StartState(q), generator)
        if self.max_cells < self.refine_cells <= data.n_cells / 2:
            found = _iterate(choose_cells(data, self.refine_cells, generator), settings, found, generator)
        return found

    def _search(self, seen: CountData, settings: MixtureSettings, generator: np.random.Generator) -> Tensor:
        """(cells, K) responsibilities."""
        n_components, n_cells = settings.n_components, seen.n_cells
        given = settings.weights == "given"
        search = self._over_genes(seen, given, generator)
        n_first = n_components
        if self.surplus > 0 and not given:  # a given prior has its number of components
            n_first += max(LEAST_SURPLUS, math.ceil(self.surplus * n_components))
            n_first = max(n_components, min(n_first, n_cells // CELLS_A_COMPONENT))
        begins = []
        for number in range(self.n_starts):
            at_random = self.random_every and (number + 1) % self.random_every == 0
            begin = search.at_random if given or at_random else search.by_k_means
            begins.append(begin(n_first, generator))

        # side by side: much of a run is too small to be shared out over threads
        first = side_by_side(lambda number: search.run(begins[number], FIRST_ITERATIONS), self.n_starts)
        kept = sorted(first, key=lambda run: -run.score)[: math.ceil(self.n_starts * GOING_ON)]
        runs = side_by_side(
            lambda number: search.without_least_missed(kept[number], n_components, ITERATIONS_A_REMOVAL),
            len(kept),
        )
        best = search.go_on(max(runs, key=lambda run: run.score), LAST_ITERATIONS)
        log.info(
            "random starts, held-out nats per cell: %s; gone on with %s; the best ends at %.3f",
            [round(run.score / n_cells, 3) for run in first],
            [round(run.score / n_cells, 3) for run in kept],
            best.score / n_cells,
        )
        return torch.softmax(best.component_joint, 1)

    def _over_genes(self, seen: CountData, given: bool, generator: np.random.Generator) -> Search:
        genes = most_variable_genes(seen.counts, seen.size_factors, self.max_genes)
        return Search.of(seen.select_genes(genes), given, self.n_axes, self.folds, generator)


@dataclass(frozen=True)
class DirichletStart:
    """Responsibilities drawn uniformly from the simplex, Dirichlet(1, ..., 1), and no search."""

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        return StartState(random_responsibilities(data.n_cells, settings.n_components, generator))


def _iterate(
    seen: CountData, settings: MixtureSettings, begin: StartState, generator: np.random.Generator
) -> StartState:
    """A few iterations of the mixture itself on some cells, with all genes."""
    basis, batches = prepare(seen, settings.folds, generator, dtype=settings.torch_dtype)
    mixture = new_mixture(seen, settings, basis, begin)
    run_em(
        mixture,
        batches,
        responsibilities=begin.responsibilities,
        max_iterations=REFINE_ITERATIONS,
        stopping=StoppingRule(),
    )
    return StartState.of(mixture)
