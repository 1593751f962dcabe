"""Starts from a part of the cells: EM on a subsample, or one M step on a first batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import numpy as np

from nbmix.core.declared import Setting, checked
from nbmix.core.em_loop import run_em
from nbmix.core.settings import MixtureSettings
from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.progress import say
from nbmix.starts.base import (
    Start,
    StartState,
    choose_cells,
    finds_components,
    new_mixture,
    prepare,
    random_responsibilities,
)
from nbmix.starts.random import RandomStart


@checked("start")
@dataclass(frozen=True)
class SubsampleStart:
    """Cross-fitted EM to convergence on a random subset of cells; its components start the fit of all.

    Attributes:
        inner: where EM on the subset begins.
    """

    name: ClassVar[str] = "subsample"

    n_cells: Annotated[int, Setting("The number of cells that EM sees.", least=1)] = 10_000
    inner: Start = field(default_factory=RandomStart)
    iterations: Annotated[int, Setting("The largest number of iterations of EM.", least=1)] = 50
    folds: Annotated[
        int, Setting("The number of folds of this EM, whatever those of the fit are. 1 is plain EM.", least=1)
    ] = 5

    @property
    def finds_components(self) -> bool:
        return self.folds > 1 and finds_components(self.inner)

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        seen = choose_cells(data, self.n_cells, generator)
        if settings.n_components > seen.n_cells:
            raise InputError(
                f"start.n_cells={seen.n_cells}: too few for model.n_components={settings.n_components}"
            )
        settings = replace(settings, folds=min(self.folds, seen.n_cells))
        begin = self.inner(seen, settings, generator)
        settings = replace(settings, n_components=begin.n_components)
        basis, batches = prepare(seen, settings.folds, generator, dtype=settings.torch_dtype)
        mixture = new_mixture(seen, settings, basis, begin)
        say("fitting a subsample")
        run_em(mixture, batches, responsibilities=begin.responsibilities, max_iterations=self.iterations)
        return StartState.of(mixture, batches)


@checked("start")
@dataclass(frozen=True)
class FirstBatchStart:
    """One M step on random responsibilities of a first batch of cells, as the source's library did."""

    name: ClassVar[str] = "first_batch"

    n_cells: Annotated[int, Setting("The number of cells in the batch.", least=1)] = 64

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        seen = choose_cells(data, self.n_cells, generator)
        q = random_responsibilities(seen.n_cells, settings.n_components, generator)
        basis, batches = prepare(seen, 1, generator, dtype=settings.torch_dtype)
        mixture = new_mixture(seen, replace(settings, folds=1), basis)
        run_em(mixture, batches, responsibilities=q, max_iterations=1)
        return StartState(components=mixture.components())
