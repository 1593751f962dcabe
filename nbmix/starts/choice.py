"""How many components: the held-out log likelihood over K, and a recommendation."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.isotonic import IsotonicRegression

from nbmix.core.settings import MixtureSettings
from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.starts.base import StartState
from nbmix.starts.random import RandomStart
from nbmix.starts.search import CELLS_A_COMPONENT, NOISE

log = logging.getLogger(__name__)

MOST_COMPONENTS = 12  # of "auto"


class Choice(NamedTuple):
    """Candidates K, and what speaks for them.

    Attributes:
        n_components: (candidates,) 1, 2, ...
        log_likelihood: (candidates,) cross-fitted nats per cell, of the search's model, cells and genes:
            to be compared with each other alone.
        gain_error: (candidates,) standard error of the gain over one component less; 0 for K = 1.
        recommended: K.
        start: where a fit of so many components begins; None where it has begun already.
    """

    n_components: np.ndarray
    log_likelihood: np.ndarray
    gain_error: np.ndarray
    recommended: int
    start: StartState | None

    @property
    def plain(self) -> dict[str, Any]:
        """All but the start, for a checkpoint."""
        arrays = (self.n_components, self.log_likelihood, self.gain_error)
        named = dict(zip(self._fields, (array.tolist() for array in arrays), strict=False))
        return {**named, "recommended": self.recommended}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Choice:
        """The choice that a checkpoint holds."""
        candidates, curve, errors = (np.array(plain[name]) for name in cls._fields[:3])
        return cls(candidates, curve, errors, plain["recommended"], None)

    def table(self) -> pd.DataFrame:
        """A row a candidate: K, log likelihood, gain over K - 1 and its error, whether to take it."""
        return pd.DataFrame(
            {
                "n_components": self.n_components,
                "log_likelihood": self.log_likelihood,
                "gain": np.diff(self.log_likelihood, prepend=np.nan),
                "gain_se": self.gain_error,
                "recommended": self.n_components == self.recommended,
            }
        )


@dataclass(frozen=True)
class Range:
    """The numbers of components that a user allows."""

    least: int
    most: int

    @classmethod
    def parse(cls, value: object) -> Range | None:
        """``auto``, or a range as in ``2-10``; None for what is no text.

        Raises:
            InputError: another text, or an impossible range.
        """
        if not isinstance(value, str):
            return None
        if value == "auto":
            return cls(1, MOST_COMPONENTS)
        found = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", value)
        if found is None:
            raise InputError(f"model.n_components={value}: give a whole number, auto, or a range as in 2-10")
        least, most = int(found[1]), int(found[2])
        if not 1 <= least <= most:
            raise InputError(
                f"model.n_components={value}: a range goes from a lower to a higher number, from 1 on"
            )
        return cls(least, most)


def too_few_cells(n_cells: int, allowed: Range) -> InputError:
    """The error where there are fewer cells than a choice needs."""
    return InputError(
        f"model.n_components: {n_cells} cells are too few to choose among {allowed.least} to {allowed.most} "
        "components; give a number"
    )


def choose_n_components(
    data: CountData,
    settings: MixtureSettings,
    allowed: Range,
    generator: np.random.Generator,
    random_start: RandomStart | None = None,
) -> Choice:
    """Search from more components than allowed down to one, and find the elbow of the log likelihood.

    Held-out log likelihood alone goes on rising while a component buys anything, also within a kind of cell.
    ``elbow`` says where what a component buys falls off.

    Args:
        data: cells to fit.
        settings: of the mixture that hands the search on to all cells; K is put in.
        allowed: K.
        generator: of all that is random.
        random_start: whose search it is; the default one.

    Raises:
        InputError: there are too few cells.
    """
    random_start = random_start or RandomStart()
    most = min(allowed.most + 1, data.n_cells // CELLS_A_COMPONENT)
    if most < allowed.least or most < 2:
        raise too_few_cells(data.n_cells, allowed)
    search = random_start.search(data, generator)
    joints = search.path(most, generator)
    candidates = np.arange(1, most + 1)
    by_cell = np.stack(
        [torch.logsumexp(joints[k], 1).numpy() for k in range(1, most + 1)]
    )  # (candidates, cells)
    curve = by_cell.mean(1)
    errors = np.concatenate([[0.0], np.diff(by_cell, axis=0).std(1) / np.sqrt(by_cell.shape[1])])
    recommended = elbow(curve, errors, allowed.least, min(allowed.most, most))
    log.info(
        "model.n_components: %d of %d to %d, by the held-out log likelihood",
        recommended,
        allowed.least,
        min(allowed.most, most),
    )
    fitted = replace(settings, n_components=recommended)
    found = StartState(torch.softmax(joints[recommended], 1))
    start = random_start.to_all_cells(search, found, data, fitted, generator)
    return Choice(candidates, curve, errors, recommended, start)


def elbow(curve: np.ndarray, errors: np.ndarray, least: int, most: int) -> int:
    """The K after which the gain of a component falls most, as a ratio.

    With g_K the gain from K - 1 to K components, of the least concave curve above the given one, this is the
    largest g_K / max(g_K+1, noise of g_K), as for factors by their eigenvalues (Ahn & Horenstein 2013).
    Where no gain is beyond noise it is ``least``.

    Args:
        curve: (candidates,) log likelihood per cell for K = 1, 2, ...
        errors: (candidates,) standard error of each gain.
        least, most: K allowed.
    """
    gains = np.diff(curve)
    noise = NOISE * errors[1:]
    # pooling neighbours that are out of order makes the curve concave
    falling = IsotonicRegression(increasing=False).fit_transform(np.arange(len(gains)), gains)
    allowed = np.arange(max(least, 2), most + 1)
    before, real = falling[allowed - 2], falling[allowed - 2] > noise[allowed - 2]
    if not real.any():
        return least
    # a gain of nothing at all has no error, so that its own noise would make too much of the one before
    after = np.maximum(np.append(falling, 0.0)[allowed - 1], noise[allowed - 2])
    ratio = np.where(real, before / np.maximum(after, np.finfo(float).tiny), 0.0)
    return int(allowed[np.argmax(ratio)])
