"""How well labels can be told at all, and how much of that is sequencing depth: logistic regression."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.evaluation.baselines.base import Baseline, Outcome

FOLDS = 10  # a tenth of the cells is held out at a time, as in the source notebook


def labels_from_counts(data: CountData, seed: int = 0, folds: int = FOLDS) -> NDArray:
    """(cells,) label that the cell's counts predict, by a classifier that has not seen the cell.

    Linear in the raw counts, one label against the others, fitted by stochastic gradient descent with
    scikit-learn's default penalty: the source's own baseline, which printed an accuracy of 0.999 on
    cytotoxic against regulatory T cells, for one tenth of the cells; here every cell is held out once.

    Args:
        data: labelled cells with counts in memory.
        seed: of the folds and of the descent.
        folds: a label needs as many cells.

    Raises:
        InputError: no labels, only one, or one with fewer cells than folds.
    """
    return _held_out(SGDClassifier(loss="log_loss", random_state=seed), data.counts, data, seed, folds)


def labels_from_size_factors(data: CountData, seed: int = 0, folds: int = FOLDS) -> NDArray:
    """(cells,) label that the size factor alone predicts: what a method gains by clustering on depth.

    The source printed an accuracy of 0.645 on the same pair. The predictor is standardised and the maximum
    found exactly: a descent in the raw unit, of thousands of molecules, ends anywhere.

    Args, Raises: as ``labels_from_counts``.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    return _held_out(classifier, data.size_factors[:, None], data, seed, folds)


def _held_out(
    classifier: ClassifierMixin, features: sp.csr_matrix | np.ndarray, data: CountData, seed: int, folds: int
) -> NDArray:
    if data.labels is None:
        raise InputError("logistic regression needs labels: name their column of obs")
    values, sizes = np.unique(data.labels, return_counts=True)
    if len(values) < 2 or sizes.min() < folds:
        raise InputError(
            f"logistic regression: label {str(values[sizes.argmin()])!r} has {sizes.min()} of {data.n_cells} "
            f"cells; there must be two labels, each with {folds} cells or more"
        )
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return cross_val_predict(classifier, features, data.labels, cv=split)


COUNTS = Baseline(
    "logistic-counts",
    "no clustering: labels predicted for held-out tenths of the cells; what can be told at all",
    lambda data, _, seed: Outcome(labels_from_counts(data, seed), f"held out, {FOLDS} folds"),
    supervised=True,
    warms_up=False,  # a few cells need not have all labels
)
SIZE_FACTORS = Baseline(
    "logistic-size",
    "the same from the size factor; what depth alone tells",
    lambda data, _, seed: Outcome(labels_from_size_factors(data, seed), f"held out, {FOLDS} folds"),
    supervised=True,
    warms_up=False,
)
