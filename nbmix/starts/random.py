"""Random starts: a search on a part of the cells, ranked by held-out likelihood and blind to labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from nbmix.core.declared import Setting, checked
from nbmix.core.em_loop import StoppingRule, run_em
from nbmix.core.m_step import NewtonMStep
from nbmix.core.settings import MixtureSettings
from nbmix.data.counts import CountData
from nbmix.progress import say
from nbmix.starts.base import StartState, choose_cells, new_mixture, prepare, random_responsibilities
from nbmix.starts.search import (
    CELLS_A_COMPONENT,
    GOING_ON,
    GOING_ON_TO_JOIN,
    ITERATIONS_A_REMOVAL,
    Search,
    gains,
)

LEAST_SURPLUS = 4  # components; a rare kind gets none of a few more while a large one is cut in parts

DEPENDENT = 4.0  # variance of log likelihood ratios, over that of independent genes: noise is doubled

ITERATIONS_OF_FEWER = 5  # of a mixture without its surplus, before it is compared with that which has it

REFINE_ITERATIONS = 4  # of the mixture itself; the rest is for all cells


@checked("start")
@dataclass(frozen=True)
class RandomStart:
    """Several short runs from random beginnings; the best one by held-out likelihood is finished.

    Runs begin at one run of k-means on principal components from random centres, or at responsibilities drawn
    uniformly from the simplex. ``Search.race`` says which go on. A cell is scored by the copy of the
    components that has not seen it.

    Where component weights are given, all runs begin at random responsibilities, with as many components as
    are wanted; else with LEAST_SURPLUS more at least, unless ``surplus`` is 0.

    Components are joined to groups because genes depend on each other within a kind. In shallow cells noise
    hides that, and more components than groups would part such cells at random. So where log likelihood
    ratios vary little more than those of independent genes, and as many components as groups do as well on
    cells that have not been seen, there are only so many.
    """

    name: ClassVar[str] = "random"
    finds_components: ClassVar[bool] = True

    n_starts: Annotated[int, Setting("The number of runs from different beginnings.", least=1)] = 4
    random_every: Annotated[
        int,
        Setting(
            "One run in so many begins at random responsibilities, the others at k-means. "
            "With 1 all do, with 0 none.",
            least=0,
        ),
    ] = 4
    surplus: Annotated[
        float,
        Setting(
            "The search begins with so many more components, as a share of the groups, "
            "and removes them one by one.",
            least=0,
            most=10,
        ),
    ] = 0.5
    n_axes: Annotated[
        int,
        Setting(
            "The number of directions in which cells of all components vary. Each triples the time.",
            least=0,
            most=3,
        ),
    ] = 1
    max_cells: Annotated[int, Setting("The number of cells that the search sees.", least=1)] = 2000
    max_genes: Annotated[
        int, Setting("The number of genes that the search sees. They are the most variable ones.", least=1)
    ] = 2000
    refine_cells: Annotated[
        int, Setting("The result is refined on so many cells, if the data hold twice as many.", least=1)
    ] = 10_000
    folds: Annotated[
        int, Setting("The number of folds of the search, which is always cross-fitted.", least=2)
    ] = 3

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        n_components = settings.n_components
        if n_components == 1:
            return StartState(torch.ones(data.n_cells, 1, dtype=torch.float64))
        search = self.search(data, generator, weights_are_given=settings.weights == "given")
        surplus = self.n_surplus(settings.n_groups or n_components)
        going_on = GOING_ON_TO_JOIN if settings.is_joined else GOING_ON
        best = search.race(self.begins(search, n_components, surplus, generator), n_components, going_on).best
        if settings.is_joined and settings.may_be_fewer and search.inflation(best) < DEPENDENT:
            assert settings.n_groups is not None
            fewer = search.without_least_missed(best, settings.n_groups, ITERATIONS_A_REMOVAL)
            fewer = search.go_on(fewer, ITERATIONS_OF_FEWER)
            if not gains(best, fewer):
                best = fewer
        found = StartState(torch.softmax(best.component_joint, 1), prior=best.model.prior)
        settings = replace(settings, n_components=found.n_components)
        return self.to_all_cells(search, found, data, settings, generator)

    def search(
        self, data: CountData, generator: np.random.Generator, *, weights_are_given: bool = False
    ) -> Search:
        """Over some of the cells and genes of ``data``, with these settings."""
        return Search.of(
            choose_cells(data, self.max_cells, generator),
            generator,
            max_genes=self.max_genes,
            n_axes=self.n_axes,
            folds=self.folds,
            weights_are_given=weights_are_given,
        )

    def n_surplus(self, n_groups: int) -> int:
        """Components beyond those wanted that runs begin with, where there are cells for them."""
        return max(LEAST_SURPLUS, math.ceil(self.surplus * n_groups)) if self.surplus > 0 else 0

    def begins(
        self, search: Search, n_components: int, surplus: int, generator: np.random.Generator
    ) -> list[Tensor]:
        """Responsibilities (cells, K and the surplus) that the runs begin at."""
        given, n_first = search.weights_are_given, n_components
        if not given:  # a given prior has its number of components
            most = search.data.n_cells // CELLS_A_COMPONENT
            n_first = max(n_components, min(n_components + surplus, most))
        begins = []
        for number in range(1, self.n_starts + 1):
            at_random = given or (self.random_every and number % self.random_every == 0)
            if at_random:
                begins.append(search.at_random(n_first, generator))
            else:  # what differs between batches may be kinds
                begins.append(search.by_k_means(n_first, generator, apart=number % 2 == 0))
        return begins

    def to_all_cells(
        self,
        search: Search,
        found: StartState,
        data: CountData,
        settings: MixtureSettings,
        generator: np.random.Generator,
    ) -> StartState:
        """What a search over ``data`` found, as a start for all of its cells.

        Args:
            found: responsibilities (cells of the search, K), and maybe the prior.

        Returns:
            These where the search saw all cells; else components that a few iterations, with all genes, fit
            to its cells and then to ``refine_cells``.
        """
        if search.cells.n_cells == data.n_cells:
            return found
        say("taking the start to all genes")
        folds = min(self.folds, max(2, search.cells.n_cells))
        settings = replace(settings, folds=folds, pseudo_cells="auto", m_step=NewtonMStep())
        found = _iterate(search.cells, settings, found, generator)
        if self.max_cells < self.refine_cells <= data.n_cells / 2:
            found = _iterate(choose_cells(data, self.refine_cells, generator), settings, found, generator)
        return found


@dataclass(frozen=True)
class DirichletStart:
    """Responsibilities drawn uniformly from the simplex, Dirichlet(1, ..., 1), and no search."""

    name: ClassVar[str] = "dirichlet"
    finds_components: ClassVar[bool] = True

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
