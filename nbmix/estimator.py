"""The Python face: ``NBMixture`` for scikit-learn's habits, ``cluster`` and ``read_10x`` for scanpy's.

They go over what ``train.py`` goes over: with ``data.validation_share=0`` it leaves the same numbers for the
same seed, and a checkpoint of either is one of the other.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_consistent_length
from sklearn.utils.validation import check_is_fitted, validate_data

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.em_loop import StoppingRule
from nbmix.core.folds import fold_shares
from nbmix.core.settings import MixtureSettings
from nbmix.data.batches import CellBatches
from nbmix.data.checkpoint import SECTION, Checkpoint, align_to_genes, load_checkpoint, write_checkpoint
from nbmix.data.counts import CountData
from nbmix.data.from_anndata import make_count_data
from nbmix.data.module import CountsDataModule
from nbmix.data.simulate import CHUNK_ENTRIES
from nbmix.data.tenx import GENES, tenx_anndata
from nbmix.errors import InputError
from nbmix.models.base import MixtureModule, Prediction
from nbmix.models.restore import MODELS, restore
from nbmix.output.report import TOP_MARKERS
from nbmix.output.results import Results, named_markers
from nbmix.starts.base import BLOCK_SIZE, Start, check_components
from nbmix.starts.choice import Range, choose_n_components
from nbmix.starts.clusters import KMeansStart, LabelsStart, TopicsStart
from nbmix.starts.random import DirichletStart, RandomStart
from nbmix.starts.subsample import FirstBatchStart, SubsampleStart
from nbmix.training.trainer import build_trainer

STARTS: dict[str, type[Start]] = {
    "random": RandomStart,
    "kmeans": KMeansStart,
    "topics": TopicsStart,
    "labels": LabelsStart,
    "subsample": SubsampleStart,
    "dirichlet": DirichletStart,
    "first_batch": FirstBatchStart,
}


class Mode(NamedTuple):
    """What a mode of inference does by default, as in conf/model."""

    start: str
    max_iter: int
    batch_size: int


MODES = {"em": Mode("random", 100, 16384), "amortized": Mode("subsample", 20, 64)}
ARGUMENTS = {"tolerance": "tol"}  # settings of the models that have another name here
OWN_SECTION = "estimator"  # of a checkpoint: arguments that are none of the model, and all genes
VERSIONS = ("nbmix", "torch", "pytorch-lightning", "numpy", "scipy", "anndata", "scikit-learn")


class NBMixture(ClusterMixin, BaseEstimator):
    """Mixture of negative binomials for raw counts, fitted by EM or by amortized inference.

        x_ij | z_i = k ~ NB(mean s_i mu_kj, inverse dispersion r_kj),    z_i ~ Categorical(pi)

    All cells are fitted: nothing is held out, other than what cross-fitting keeps from each fold's copy.
    The same ``random_state`` gives the same bits on the same machine and number of threads.

    Cells come as AnnData, or as a (cells, genes) SciPy sparse matrix or array of any format, NumPy array or
    DataFrame, and hold raw counts: whole numbers, not negative. Genes without a count in the cells of the
    fit take no part. New cells in an AnnData are brought to the genes of the fit by name; in anything else
    genes are in the order of the fit.

    Args:
        n_components: K; or "auto", or a range such as "2-10", to have it chosen: ``n_components_``.
        model: "em" or "amortized".
        start: "random", "kmeans", "topics", "labels", "subsample", "dirichlet" or "first_batch", or an
            object of ``nbmix.starts`` with settings of its own; default "random" for EM, else "subsample".
        folds: cells are split into this many for cross-fitting, 1 is plain EM; for EM alone.
        pseudo_cells: what pulls the components' genes to the average cell, see ``nbmix.core.mixture``.
        weights: pi is "learned", "uniform", or "given" for each cell, by ``prior_key``.
        tol: EM has converged once its objective rises by less, relative; for EM alone.
        max_iter: iterations of EM (default 100) or epochs (default 20) at most.
        batch_size: cells in a batch at most; default 16384 for EM, else 64.
        model_settings: other settings of the model, by the names in conf/model, such as ``patience``,
            ``m_step`` and ``dtype`` for EM, ``n_hidden`` and ``lr`` for amortized inference.
        layer: of an AnnData: where the raw counts are; default X.
        size_factor_key: of an AnnData: column of obs with size factors; default the counts of each cell.
        prior_key: of an AnnData: entry of obsm, (cells, K), for ``weights="given"``.
        random_state: seed of folds, start, encoder and minibatches.

    Attributes:
        n_components_: K.
        choice_: where K was left open, a row for each candidate: log likelihood of the search on cells that
            it has not seen, its gain over one component less with standard error, and whether it was taken:
            the elbow. It is worth a look, for there may be several. Else None.
        weights_: (K,) pi; of the copy of the components that is fitted to all cells, as the next two.
            1 / K where it is uniform, or given for each cell.
        log_mean_: (K, genes) ln mu, per unit of size factor; NaN for genes that take no part.
        log_inv_disp_: (K, genes) ln r.
        responsibilities_: (cells, K) of the cells of the fit. Where folds > 1 a cell's come from
            components that have not seen it; ``predict_proba`` of the same cell may differ.
        labels_: (cells,) the component of the largest responsibility.
        log_likelihoods_: (cells,) ln p(x_i) in nats, as ``score_samples`` of the cells of the fit.
        lower_bounds_: (iterations,) objective in nats per cell: the log likelihood with the log prior where
            folds = 1, the cross-fitted held-out log likelihood where folds > 1, or the ELBO. The first
            iterations have none where the start has seen the cells.
        lower_bound_: the last of them.
        n_iter_: iterations or epochs.
        converged_: whether EM has converged; None for amortized inference.
        n_features_in_, feature_names_in_: number of genes, and their names if the input had any.

    >>> import nbmix
    >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
    >>> mixture = nbmix.NBMixture(n_components=2, start="kmeans").fit(cells.counts)
    >>> mixture.predict_proba(cells.counts).shape
    (200, 2)
    """

    def __init__(
        self,
        n_components: int | str = MixtureSettings.n_components,
        *,
        model: str = "em",
        start: str | Start | None = None,
        folds: int = MixtureSettings.folds,
        pseudo_cells: float | str = MixtureSettings.pseudo_cells,
        weights: str = MixtureSettings.weights,
        tol: float = StoppingRule.tolerance,
        max_iter: int | None = None,
        batch_size: int | None = None,
        model_settings: Mapping[str, Any] | None = None,
        layer: str | None = None,
        size_factor_key: str | None = None,
        prior_key: str | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.n_components = n_components
        self.model = model
        self.start = start
        self.folds = folds
        self.pseudo_cells = pseudo_cells
        self.weights = weights
        self.tol = tol
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.model_settings = model_settings
        self.layer = layer
        self.size_factor_key = size_factor_key
        self.prior_key = prior_key
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = tags.input_tags.positive_only = True
        return tags

    def fit(self, X: Any, y: Any = None, *, size_factors: ArrayLike | None = None) -> NBMixture:
        """Fit the mixture to all cells of ``X``.

        Args:
            X: (cells, genes) raw counts, see above.
            y: (cells,) known labels for ``start="labels"``; no other start sees them.
            size_factors: (cells,) or one number, where ``X`` is no AnnData; default the counts of each cell.

        Raises:
            InputError: counts that are none, or a setting that cannot be used.

        Warns:
            ConvergenceWarning: EM reached ``max_iter`` before it converged.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> mixture.log_mean_.shape, mixture.labels_.shape, mixture.converged_
        ((2, 50), (200,), True)
        """
        with _names_of_arguments():
            self._fit(X, y, size_factors)
        return self

    def fit_predict(self, X: Any, y: Any = None, *, size_factors: ArrayLike | None = None) -> np.ndarray:
        """Fit, and return ``labels_``.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> nbmix.NBMixture(2, start="kmeans").fit_predict(cells.counts).shape
        (200,)
        """
        return self.fit(X, y, size_factors=size_factors).labels_

    def predict(self, X: Any, *, size_factors: ArrayLike | None = None) -> np.ndarray:
        """The component (cells,) of the largest responsibility, from the components of all cells.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> mixture.predict(cells.counts[:5]).shape
        (5,)
        """
        return self.predict_proba(X, size_factors=size_factors).argmax(1)

    def predict_proba(self, X: Any, *, size_factors: ArrayLike | None = None) -> np.ndarray:
        """Responsibilities (cells, K): softmax_k(ln pi_k + l_ik) for EM, else what the encoder says.

        A cell without counts gets pi.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> float(mixture.predict_proba(cells.counts).sum().round(6))
        200.0
        """
        return self._predict(X, size_factors).responsibilities.numpy()

    def score_samples(self, X: Any, *, size_factors: ArrayLike | None = None) -> np.ndarray:
        """ln p(x_i) = ln sum_k pi_k exp(l_ik) of each cell (cells,), in nats, with the -ln G(x + 1) term.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> bool((mixture.score_samples(cells.counts) < 0).all())
        True
        """
        return self._predict(X, size_factors).log_likelihood.numpy()

    def score(self, X: Any, y: Any = None, *, size_factors: ArrayLike | None = None) -> float:
        """Log likelihood per cell, in nats: of cells that were not fitted it compares K, models and starts.

        ``GridSearchCV`` and ``cross_val_score`` use it.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=300, p=50, k=2, seed=1)
        >>> fitted, held_out = cells.counts[:200], cells.counts[200:]
        >>> one, two = (nbmix.NBMixture(k, start="kmeans").fit(fitted).score(held_out) for k in (1, 2))
        >>> two > one
        True
        """
        return float(self.score_samples(X, size_factors=size_factors).mean())

    def bic(self, X: Any, *, size_factors: ArrayLike | None = None) -> float:
        """-2 ln p(X) + (2 K genes + K - 1) ln n, without K - 1 unless pi is learned (Schwarz 1978).

        It counts every mean and dispersion as a free number, which they are not under the prior that
        ``pseudo_cells="auto"`` learns, so that it favours few components: ``score`` on held-out cells is
        the better guide to K.

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> one, two = (nbmix.NBMixture(k, start="kmeans").fit(cells.counts) for k in (1, 2))
        >>> two.bic(cells.counts) < one.bic(cells.counts)
        True
        """
        log_likelihood = self.score_samples(X, size_factors=size_factors)
        n_free = 2 * int(np.isfinite(self.log_mean_).sum())
        if self.weights == "learned":
            n_free += len(self.weights_) - 1
        return float(-2 * log_likelihood.sum() + n_free * np.log(len(log_likelihood)))

    def sample(
        self, n_samples: int = 1, *, size_factors: ArrayLike | None = None
    ) -> tuple[sp.csr_matrix, np.ndarray]:
        """Draw cells: z ~ Categorical(pi), lambda ~ Gamma(shape r, scale mu / r), x ~ Poisson(s lambda).

        Genes that take no part are 0. Repeated calls draw the same cells where ``random_state`` is a number.

        Args:
            n_samples: cells.
            size_factors: (n_samples,) or one number; default the median of the cells of the fit.

        Returns:
            Counts (n_samples, genes) CSR float32, and components (n_samples,).

        >>> import nbmix
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> counts, components = mixture.sample(3)
        >>> counts.shape, components.shape
        ((3, 50), (3,))
        """
        check_is_fitted(self, "weights_")
        if n_samples < 1:
            raise InputError(f"n_samples={n_samples}: must be 1 or more")
        sizes = _each_cell(
            self._fitted.median_size_factor if size_factors is None else size_factors, n_samples
        )
        generator = np.random.default_rng(_seed(self.random_state))
        drawn = np.sort(
            generator.choice(len(self.weights_), n_samples, p=self.weights_ / self.weights_.sum())
        )
        drawn = generator.permutation(drawn)
        taking_part = np.isfinite(self.log_mean_[0])
        shape = np.exp(np.where(taking_part, self.log_inv_disp_, 0))  # (K, genes)
        scale = np.exp(np.where(taking_part, self.log_mean_ - self.log_inv_disp_, -np.inf))
        rows = max(1, CHUNK_ENTRIES // shape.shape[1])
        blocks = []
        for start in range(0, n_samples, rows):
            z, s = drawn[start : start + rows], sizes[start : start + rows, None]
            rate = s * generator.gamma(shape[z], scale[z])  # (block, genes)
            blocks.append(sp.csr_matrix(generator.poisson(rate).astype(np.float32)))
        return sp.vstack(blocks, format="csr"), drawn

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, which ``load``, ``train.py task=predict`` and ``start=checkpoint`` read.

        It holds what new cells need: what is known of the cells of the fit stays behind, and of the arguments
        objects, such as a start or an M step.

        >>> import nbmix, tempfile
        >>> cells = nbmix.simulate(n=200, p=50, k=2, seed=1)
        >>> mixture = nbmix.NBMixture(2, start="kmeans").fit(cells.counts)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mixture.save(f"{folder}/two.ckpt")
        ...     again = nbmix.NBMixture.load(f"{folder}/two.ckpt")
        >>> again.score(cells.counts) == mixture.score(cells.counts)
        True
        """
        check_is_fitted(self, "weights_")
        fitted = self._fitted
        arguments = {name: _plain(value) for name, value in self.get_params(deep=False).items()}
        names = getattr(self, "feature_names_in_", None)
        content = {
            "state_dict": fitted.state,
            SECTION: {
                "model": fitted.model,
                "settings": fitted.settings,
                "gene_names": fitted.gene_names.tolist(),
                "median_size_factor": fitted.median_size_factor,
                "cells": fitted.cells,
            },
            fitted.model: {
                "objective": self.lower_bounds_.tolist(),
                "n_iterations": self.n_iter_,
                "converged": self.converged_,
            },
            OWN_SECTION: {
                "arguments": {k: v for k, v in arguments.items() if isinstance(v, str | float | int | None)},
                "genes": self._taking_part.tolist(),
                "n_genes": self.n_features_in_,
                "gene_names": None if names is None else names.tolist(),
            },
        }
        write_checkpoint(content, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NBMixture:
        """Read a checkpoint of ``save`` or of ``train.py``, of either mode; nothing in it is executed.

        Of a checkpoint of ``train.py`` genes are those that were fitted, and arguments that are none of the
        model are the defaults.

        Raises:
            InputError: the file is missing, damaged, or not a checkpoint of nbmix.

        >>> from nbmix import NBMixture
        >>> NBMixture.load("none.ckpt")
        Traceback (most recent call last):
        nbmix.errors.InputError: path=none.ckpt: there is no such file
        """
        path = Path(path)
        checkpoint = load_checkpoint(path, "path")
        if checkpoint.model not in MODES:
            raise InputError(f"path={path}: is of model={checkpoint.model}; NBMixture has {', '.join(MODES)}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        own = content.get(OWN_SECTION, {})
        settings = dict(checkpoint.settings)
        if "tolerance" in settings:
            settings["tol"] = settings.pop("tolerance")
        known = cls._get_param_names()
        arguments = own.get("arguments", {}) | {k: v for k, v in settings.items() if k in known}
        others = {k: v for k, v in settings.items() if k not in known}
        mixture = cls(**arguments | {"model": checkpoint.model, "model_settings": others or None})
        n_genes = own.get("n_genes", len(checkpoint.gene_names))
        mixture.n_features_in_ = n_genes
        if (names := own.get("gene_names", checkpoint.gene_names)) is not None:
            mixture.feature_names_in_ = np.asarray(names, dtype=object)
        mixture._take(checkpoint, np.asarray(own.get("genes", np.arange(n_genes))))
        progress = content.get(checkpoint.model, {})
        mixture._report(
            progress.get("objective", []), progress.get("n_iterations", 0), progress.get("converged")
        )
        return mixture

    def _fit(self, X: Any, y: Any, size_factors: ArrayLike | None) -> Results:
        allowed = Range.parse(self.n_components)
        kind, settings = self._model()
        max_iter = _default(self.max_iter, MODES[self.model].max_iter)
        if max_iter < 1:
            raise InputError(f"max_iter={max_iter}: must be 1 or more")
        start, seed = self._start(), _seed(self.random_state)
        if y is None and isinstance(start, LabelsStart):
            raise InputError("start=labels: give the labels as y of NBMixture.fit")
        everything = self._read(X, size_factors, reset=True)
        if y is not None:
            check_consistent_length(everything.counts, y)
            everything = replace(everything, labels=np.ravel(y).astype(str))
        taking_part = np.flatnonzero(everything.counts.sum(axis=0))
        data = everything.select_genes(taking_part)
        cells = CountsDataModule(
            lambda: data,
            batch_size=_default(self.batch_size, MODES[self.model].batch_size),
            validation_share=0.0,
            folds=settings.get("folds", 1),
            shuffle=kind.shuffle,
            dtype=settings.get("dtype", "float32"),
            seed=seed,
        )
        cells.setup()
        with torch.random.fork_rng(devices=[]):  # encoder and loaders draw from torch's own generator
            torch.manual_seed(seed)
            generator = np.random.default_rng(seed)
            search = start if isinstance(start, RandomStart) else None
            choice = None
            if allowed is not None:
                one = MixtureSettings(1, weights=self.weights)
                choice = choose_n_components(data, one, allowed, generator, search)
                settings["n_components"] = choice.recommended
            module: MixtureModule = kind(data.gene_names, **settings)
            check_components(data, module.mixture.settings)
            found_start = choice.start if choice is not None and search is not None else None
            module.begin(found_start or start(data, module.mixture.settings, generator), cells)
            with _quiet_trainer():
                trainer = build_trainer(max_epochs=max_iter, enable_checkpointing=False, alone=True)
                trainer.fit(module, datamodule=cells)
            found = _apply(module, cast(Iterable[CellBatch], cells.predict_dataloader()), data.n_cells)
        state = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        median = float(np.median(data.size_factors))
        self._take(Checkpoint(kind.kind, module.plain, data.gene_names, median, "", state), taking_part)
        self._report(module.objective, module.n_iterations, module.converged)
        self.choice_ = None if choice is None else choice.table()
        self.responsibilities_ = found.responsibilities.numpy()
        self.labels_ = self.responsibilities_.argmax(1)
        self.log_likelihoods_ = found.log_likelihood.numpy()
        if module.converged is False:
            warnings.warn(
                f"EM has not converged in max_iter={max_iter} iterations: raise max_iter, or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        return Results(cells, module, found, {})

    def _model(self) -> tuple[type[MixtureModule], dict[str, Any]]:
        """The class that ``model`` names, and the settings that it takes."""
        if self.model not in MODES:
            raise InputError(f"model={self.model}: choose one of {', '.join(MODES)}")
        kind = MODELS[self.model]
        known = set(inspect.signature(kind).parameters) - {"gene_names"}
        others = dict(self.model_settings or {})
        if unknown := sorted(set(others) - known):
            raise InputError(
                f"model_settings: model={self.model} has no {unknown[0]!r}; its settings are "
                f"{', '.join(sorted(known))}"
            )
        arguments = {
            "n_components": self.n_components,
            "folds": self.folds,
            "pseudo_cells": self.pseudo_cells,
            "weights": self.weights,
            "tolerance": self.tol,
        }
        settings = {name: _plain(value) for name, value in arguments.items() if name in known}
        return kind, settings | {name: _plain(value) for name, value in others.items()}

    def _start(self) -> Start:
        start = _default(self.start, MODES[self.model].start)
        if isinstance(start, str) and start not in STARTS:
            raise InputError(
                f"start={start}: choose one of {', '.join(STARTS)}, or an object of nbmix.starts"
            )
        return STARTS[start]() if isinstance(start, str) else start

    def _take(self, fitted: Checkpoint, taking_part: np.ndarray) -> None:
        """Keep a fit of the genes at positions ``taking_part``."""
        self._fitted, self._taking_part = fitted, taking_part
        components = fitted.components
        shape = (components.log_mean.shape[0], self.n_features_in_)
        self.log_mean_, self.log_inv_disp_ = np.full(shape, np.nan), np.full(shape, np.nan)
        self.log_mean_[:, taking_part] = components.log_mean.numpy()
        self.log_inv_disp_[:, taking_part] = components.log_inv_disp.numpy()
        self.weights_ = fitted.state["mixture.log_weights"][-1].exp().numpy()
        self.n_components_, self.choice_ = len(self.weights_), None

    def _report(self, objective: Iterable[float], n_iterations: int, converged: bool | None) -> None:
        self.lower_bounds_ = np.array(objective, dtype=np.float64)
        self.lower_bound_ = float(self.lower_bounds_[-1]) if self.lower_bounds_.size else np.nan
        self.n_iter_, self.converged_ = n_iterations, converged

    def _predict(self, X: Any, size_factors: ArrayLike | None) -> Prediction:
        """What the components of all cells say of the cells of ``X``."""
        check_is_fitted(self, "weights_")
        with _names_of_arguments():
            data = self._read(X, size_factors, reset=False)
            with torch.random.fork_rng(devices=[]):  # an encoder is drawn before it is filled
                module = restore(self._fitted)
            if isinstance(X, ad.AnnData) and hasattr(self, "feature_names_in_"):
                there, here = align_to_genes(self._fitted.gene_names, data.gene_names, "NBMixture")
                module.restrict_genes(there)
                data = data.select_genes(here)
            else:
                data = data.select_genes(self._taking_part)
            # interpolated exactly: what is said of a cell does not depend on the others
            basis = Basis.of(data.counts, data.size_factors)
            module.mixture.attach(basis, float(data.size_factors.sum()))
            cells = CellBatches(data, basis)
            blocks = fold_shares(np.arange(data.n_cells), data.size_factors, BLOCK_SIZE)
            return _apply(module, (cells.batch(rows) for rows in blocks), data.n_cells)

    def _read(self, X: Any, size_factors: ArrayLike | None, *, reset: bool) -> CountData:
        """Cells that have passed the door, with all genes; ``reset`` where they are those of a fit."""
        if isinstance(X, ad.AnnData):
            if size_factors is not None:
                raise InputError(
                    "size_factors: an AnnData has them in obs; name the column by size_factor_key"
                )
            data = make_count_data(
                X,
                where="adata",
                label_key=None,
                layer=self.layer,
                size_factor_key=self.size_factor_key,
                prior_key=self.prior_key,
                min_counts=0,
            )
            if reset:
                self.n_features_in_ = data.n_genes
                self.feature_names_in_ = data.gene_names.astype(object)
            elif not hasattr(self, "feature_names_in_") and data.n_genes != self.n_features_in_:
                raise InputError(
                    f"adata: has {data.n_genes} genes; the fit had {self.n_features_in_}, without names"
                )
            return data
        for name in ("layer", "size_factor_key", "prior_key"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name}={getattr(self, name)!r}: a {type(X).__name__} has none; give an AnnData"
                )
        cells = X.index.astype(str) if isinstance(X, pd.DataFrame) else None
        x = self._matrix(X, reset=reset)
        names = getattr(self, "feature_names_in_", None)
        adata = ad.AnnData(
            x,
            obs=pd.DataFrame(index=pd.RangeIndex(x.shape[0]).astype(str) if cells is None else cells),
            var=pd.DataFrame(index=pd.Index(range(x.shape[1]) if names is None else names).astype(str)),
        )
        if size_factors is not None:
            adata.obs["size_factors"] = _each_cell(size_factors, adata.n_obs)
        key = None if size_factors is None else "size_factors"
        return make_count_data(adata, where="counts", label_key=None, size_factor_key=key, min_counts=0)

    def _matrix(self, X: Any, *, reset: bool) -> sp.spmatrix | np.ndarray:
        """Numbers (cells, genes) of any input but AnnData; whether they are counts is not known yet."""
        least = 2 if reset else 1
        x = validate_data(
            self, X, reset=reset, accept_sparse=True, ensure_all_finite=False, ensure_min_samples=least
        )
        if sp.issparse(x) and x.format not in ("csr", "csc"):  # which AnnData would refuse
            return sp.csr_matrix(x.astype(np.float64))
        return x


def cluster(
    adata: ad.AnnData,
    n_components: int | str = 4,
    *,
    key_added: str = "nbmix",
    copy: bool = False,
    **arguments: Any,
) -> ad.AnnData | None:
    """Cluster the cells of an AnnData by a mixture of negative binomials of their raw counts.

    What is written has the names that ``result.h5ad`` of ``train.py`` has, "nbmix" being ``key_added``:

        obs["nbmix"]                   component of the largest responsibility, "0" to "K - 1"
        obs["nbmix_probability"]       that responsibility
        obs["nbmix_log_likelihood"]    ln p(x_i) in nats
        obsm["X_nbmix"]                (cells, K) responsibilities; see ``NBMixture.responsibilities_``
        varm["nbmix_log_mean"]         (genes, K) ln mu; NaN for genes without a count
        varm["nbmix_log_inv_disp"]     (genes, K) ln r
        uns["nbmix"]                   model, log_weights, objective (trace), n_iterations, and as JSON in
                                       provenance the arguments and versions
        uns["nbmix"]["markers"]        table of the best markers of each component, as in markers.csv, see
                                       ``nbmix.evaluation.markers.marker_table``
        uns["nbmix"]["choice"]         where K was left open, see ``NBMixture.choice_``

    Args:
        adata: (cells, genes) with raw counts in X, or in ``layer``.
        n_components: K; or "auto", or a range such as "2-10", to have it chosen.
        key_added: what names begin with.
        copy: write into a copy, and return it.
        arguments: all others of ``NBMixture``, such as ``layer``, ``size_factor_key``, ``start`` and
            ``random_state``.

    Raises:
        InputError: counts that are none, or a setting that cannot be used.

    Warns:
        ConvergenceWarning: EM reached ``max_iter`` before it converged.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=200, p=50, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, start="kmeans")
    >>> adata.obs["nbmix"].cat.categories.tolist(), adata.obsm["X_nbmix"].shape
    (['0', '1'], (200, 2))
    >>> markers = adata.uns["nbmix"]["markers"]
    >>> markers[markers["rank"] == 1][["component", "share"]].shape
    (2, 2)
    """
    if not isinstance(adata, ad.AnnData):
        raise InputError(f"adata is a {type(adata).__name__}; for other data use nbmix.NBMixture")
    mixture = NBMixture(n_components, **arguments)
    with _names_of_arguments():
        markers = named_markers(mixture._fit(adata, None, None))
    if copy:
        adata = adata.copy()
    q = mixture.responsibilities_
    categories = [str(k) for k in range(q.shape[1])]
    adata.obs[key_added] = pd.Categorical(mixture.labels_.astype(str), categories)
    adata.obs[f"{key_added}_probability"] = q.max(1)
    adata.obs[f"{key_added}_log_likelihood"] = mixture.log_likelihoods_
    adata.obsm[f"X_{key_added}"] = q
    adata.varm[f"{key_added}_log_mean"] = mixture.log_mean_.T
    adata.varm[f"{key_added}_log_inv_disp"] = mixture.log_inv_disp_.T
    adata.uns[key_added] = {
        "model": mixture.model,
        "log_weights": np.log(mixture.weights_),
        "objective": mixture.lower_bounds_,
        "n_iterations": mixture.n_iter_,
        "markers": markers[markers["rank"] <= TOP_MARKERS].reset_index(drop=True),
        "provenance": json.dumps(
            {
                "config": mixture.get_params(deep=False),
                "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
                "threads": torch.get_num_threads(),
            },
            default=repr,
        ),
    }
    if mixture.choice_ is not None:
        adata.uns[key_added]["choice"] = mixture.choice_
    return adata if copy else None


def read_10x(
    path: str | os.PathLike[str], *, genome: str | None = None, feature_type: str | None = GENES
) -> ad.AnnData:
    """Read what Cell Ranger left: counts with cells by barcode and genes by Ensembl id, symbols beside them.

    ``scanpy.read_10x_mtx`` and ``scanpy.read_10x_h5`` do as well.

    Args:
        path: folder with matrix.mtx, or .h5 file; of the filtered matrix, whose barcodes are cells.
        genome: of an .h5 file with several; None for all.
        feature_type: features to keep, where the file tells; None for all.

    Returns:
        (cells, genes) raw counts in X, ``var["symbol"]``; ``var["feature_type"]`` and ``var["genome"]`` if
        the file has them.

    Raises:
        InputError: one line that names the file and what in it cannot be used.

    >>> import nbmix, pathlib, tempfile
    >>> files = {"barcodes.tsv": "AAAC-1\\nAAAG-1\\n", "genes.tsv": "ENSG01\\tCD79A\\nENSG02\\tLYZ\\n"}
    >>> files["matrix.mtx"] = "%%MatrixMarket matrix coordinate integer general\\n2 2 2\\n1 1 3\\n2 2 5\\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, text in files.items():
    ...         _ = pathlib.Path(folder, name).write_text(text)
    ...     adata = nbmix.read_10x(folder)
    >>> adata.to_df()
            ENSG01  ENSG02
    AAAC-1     3.0     0.0
    AAAG-1     0.0     5.0
    """
    with _names_of_arguments():
        return tenx_anndata(path, f"path={os.fspath(path)}", genome, feature_type)


def _apply(module: MixtureModule, batches: Iterable[CellBatch], n_cells: int) -> Prediction:
    """Predictions of all cells, in their order."""
    parts = [module.predict_step(batch, number) for number, batch in enumerate(batches)]
    joined = Prediction(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
    order = joined.rows.argsort()
    assert order.numel() == n_cells
    return Prediction(*(part[order] for part in joined))


def _each_cell(size_factors: ArrayLike, n_cells: int) -> np.ndarray:
    """(cells,) float64 of one number or one a cell."""
    sizes = np.asarray(size_factors, dtype=np.float64).reshape(-1)
    if sizes.size not in (1, n_cells):
        raise InputError(f"size_factors holds {sizes.size} values for {n_cells} cells")
    return np.broadcast_to(sizes, n_cells)


def _seed(random_state: int | np.random.RandomState | None) -> int:
    """A seed: the number itself, or one drawn from the generator."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if not isinstance(_plain(random_state), int) or random_state < 0:
        raise InputError(f"random_state={random_state}: must be a whole number from 0 on, or None")
    return int(random_state)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else _plain(value)


def _plain(value: Any) -> Any:
    """A NumPy number, such as a grid search gives, as one of Python's."""
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _names_of_arguments() -> Iterator[None]:
    """Settings in messages by the names that they have here: layer='counts', not data.layer=counts."""
    try:
        yield
    except InputError as error:
        message = re.sub(r"\bdata\.layer=(\w+)", r"layer='\1'", str(error))
        message = re.sub(
            r"\b(?:data|model)\.(\w+)", lambda found: ARGUMENTS.get(found[1], found[1]), message
        ).replace("=null", "=None")
        raise InputError(message) from error.__cause__


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Lightning as a part of something else: its warnings do not leave, and Ctrl-C works as everywhere."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            yield
    except SystemExit as stop:  # Lightning's answer to Ctrl-C; it lets SIGINT be ignored from then on
        if in_main and isinstance(stop.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from None
        raise
