"""The pictures of the report: functions from a result to a figure, or None where there is nothing to show.

``evaluation.pictures`` names them, in the order of the report. A new one is a function of this kind in any
module: its name is that of the file in figures/, the first line of its docstring the title in the report,
the rest the caption. Its attribute ``section`` says under which head of the report it stands, if not groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Protocol, TypeVar, get_args

import numpy as np
import torch
from matplotlib.figure import Figure

from nbmix.core.folds import by_origin
from nbmix.core.joins import group_log_joint
from nbmix.core.likelihood import component_log_likelihood
from nbmix.data.counts import some_rows
from nbmix.errors import InputError
from nbmix.evaluation import plots
from nbmix.evaluation.calibration import reliability as reliability_bins
from nbmix.evaluation.markers import Markers, compare_with_poisson, top_markers
from nbmix.evaluation.metrics import match_cells, overlap_table
from nbmix.evaluation.plots.interactive import InteractiveCells, interactive_cells
from nbmix.output.batches import batches_table
from nbmix.output.report import TOP_MARKERS, Section
from nbmix.output.results import Results, loaded, named_markers

MOST_BATCHES_SHOWN = 40  # rows that can be read


class Draw(Protocol):
    """A function that makes a picture; see above."""

    __name__: str

    def __call__(self, results: Results, /) -> Figure | InteractiveCells | None: ...


Drawing = TypeVar("Drawing", bound=Draw)


def under(section: Section) -> Callable[[Drawing], Drawing]:
    """Say under which head of the report a picture stands."""

    def mark(draw: Drawing) -> Drawing:
        draw.section = section  # type: ignore[attr-defined]  # which functions may have
        return draw

    return mark


def title_and_caption(draw: Draw) -> tuple[str, str]:
    """What its docstring says; its name where there is none.

    >>> title_and_caption(component_sizes)
    ('Group sizes', 'Cells assigned to each group; in brackets the mean probability of their group.')
    """
    title, _, caption = (inspect.getdoc(draw) or draw.__name__).partition("\n")
    return title.rstrip("."), " ".join(caption.split())


def section_of(draw: Draw) -> Section:
    """Under which head of the report a picture stands: its attribute ``section``, else "groups".

    Raises:
        InputError: there is no such head.
    """
    section: Section = getattr(draw, "section", "groups")
    if section not in get_args(Section):
        raise InputError(f"section={section!r}: must be one of {', '.join(get_args(Section))}")
    return section


def n_components(results: Results) -> Figure | None:
    """Number of components.

    Held-out log likelihood of the search with different numbers of components. Ringed: the recommended one,
    after which a component brings much less. Bars: standard error of the gain over one less.
    """
    choice = results.choice
    if choice is None:
        return None
    return plots.held_out_curve(
        choice.n_components, choice.log_likelihood, choice.gain_error, recommended=choice.recommended
    )


def joins(results: Results) -> Figure | None:
    """Joins of components.

    Components, and the groups that they are joined to; each join is drawn where the separation of the two is.
    Orange: there is a gap between them. Blue: cells lie all the way from one to the other, as within one
    kind. Joins within the groups of this result are thick, and its groups are named.
    """
    tree = results.joins
    if tree is None or not tree.joins:
        return None
    drawn = [(join.first, join.second, join.separation, tree.has_gap(join)) for join in tree.joins]
    n_components = results.of_components.shape[1]
    n_cells = np.bincount(results.of_components.argmax(1), minlength=n_components)
    return plots.join_dendrogram(drawn, n_cells, results.groups)


def separations(results: Results) -> Figure | None:
    """Separation of groups.

    Distance of each two groups, in standard deviations of their cells. Where there is no gap between them the
    number is in brackets: cells lie all the way from one to the other.
    """
    pairs = results.separations
    if pairs is None or not len(pairs):
        return None
    shown = np.unique(results.assignments)
    pairs = pairs[pairs["first"].isin(shown) & pairs["second"].isin(shown)]
    if not len(pairs):
        return None
    first, second = (np.searchsorted(shown, pairs[side]) for side in ("first", "second"))
    return plots.separation_matrix(
        len(shown), first, second, pairs["separation"], pairs["gap"], shown.tolist()
    )


@under("diagnostics")
def objective_trace(results: Results) -> Figure | None:
    """Objective.

    Nats per cell at every iteration, or epoch.
    """
    model = results.model
    if not model.objective:
        return None
    # EM's first iteration may begin at what has none
    first = model.n_iterations - len(model.objective) + 1
    iterations = range(first, first + len(model.objective))
    return plots.objective_trace(iterations, {model.objective_name: model.objective})


def component_sizes(results: Results) -> Figure:
    """Group sizes.

    Cells assigned to each group; in brackets the mean probability of their group.
    """
    return plots.component_sizes(results.responsibilities)


@under("cells")
def interactive_embedding(results: Results) -> InteractiveCells:
    """Cells, one by one.

    Point at a cell, or tap it, for its name, group, probability and second-best group. Click a group to hide
    it. Cells are placed by their counts alone.
    """
    place, some = results.embedding, results.shown_cells
    posterior = results.responsibilities[results.shown_rows]
    return interactive_cells(place.name, place.coordinates, posterior, some.cell_names, some.labels)


@under("cells")
def posterior_embedding(results: Results) -> Figure:
    """Cells.

    Cells placed by their counts alone; a group has the colour of the label that it matches.
    """
    place = results.embedding
    posterior = results.responsibilities[results.shown_rows]
    return plots.posterior_on_embedding(place.name, place.coordinates, posterior, results.shown_cells.labels)


@under("cells")
def certainty_embedding(results: Results) -> Figure:
    """Certainty.

    The same cells; the darker one is, the less probable is its group. Cells between two groups are dark.
    """
    place = results.embedding
    return plots.certainty_on_embedding(
        place.name, place.coordinates, results.responsibilities[results.shown_rows]
    )


@under("markers")
def marker_dots(results: Results) -> Figure:
    """Markers over groups.

    The best markers of each group, by rows, in every group. A dot is as large as the share of the group's
    cells with a count; it is dark where the gene's mean is near that of the group where it is highest. The
    group that a gene is a marker of is framed.
    """
    table = named_markers(results, TOP_MARKERS)
    shown = np.unique(results.assignments)
    best = top_markers(table, None, [str(k) for k in shown])
    genes = {name: j for j, name in enumerate(results.data.data.gene_names)}
    rows = np.array([genes[name] for name in best["gene"]])
    log_mean, share = (
        t.numpy()[np.ix_(shown, rows)].T for t in (results.profiles.log_mean, results.markers.share)
    )
    names = best["symbol" if "symbol" in best else "gene"]
    return plots.marker_dots(
        names.tolist(), np.searchsorted(shown, best["component"]), log_mean, share, shown.tolist()
    )


def component_label_table(results: Results) -> Figure | None:
    """Labels and groups.

    Cells of each label in each group; the colour is the share of the label.
    """
    labels, assignments = results.data.data.labels, results.assignments
    if labels is None:
        return None
    return plots.component_label_table(*overlap_table(labels, assignments, results.responsibilities.shape[1]))


def component_batch_table(results: Results) -> Figure | None:
    """Batches and groups.

    Cells of each batch in each group; the colour is the share of the batch. The largest batches are shown.
    """
    table = batches_table(results)
    if table is None:
        return None
    largest = np.sort(np.argsort(-table.to_numpy().sum(0), kind="stable")[:MOST_BATCHES_SHOWN])
    shown = table.iloc[:, largest]
    return plots.component_batch_table(shown.columns, shown.to_numpy().T)


def component_label_correlation(results: Results) -> Figure | None:
    """Correlation of labels and groups.

    Over the cells, between having a label and the posterior of a group.
    """
    labels = results.data.data.labels
    return None if labels is None else plots.component_label_correlation(labels, results.responsibilities)


@under("diagnostics")
def posterior_histogram(results: Results) -> Figure:
    """Largest posterior.

    How sure each cell's assignment is. Thousands of genes that count as independent make probabilities near
    0 and 1; do not read them as calibrated.
    """
    return plots.posterior_histogram(results.responsibilities)


@under("diagnostics")
def reliability(results: Results) -> Figure | None:
    """Reliability.

    Share of cells assigned to the group that matches their label, against the probability of their
    assignment; on the diagonal probabilities are what they say. Bars are 95% intervals. Tempering takes off
    what genes add that rise and fall together; it cannot mend groups that are none of the labels.
    """
    labels, q = results.data.data.labels, results.responsibilities
    if labels is None:
        return None
    correct = match_cells(labels, q).correct
    curves = {"posterior": reliability_bins(q.max(1), correct)}
    if results.inverse_temperature is not None:
        curves["tempered"] = reliability_bins(results.probabilities, correct)
    return plots.reliability_diagram(curves)


@under("diagnostics")
def log_likelihood_margins(results: Results) -> Figure:
    """Margins.

    How much better than any other group its own explains a cell; of held-out cells where there are any, else
    of cells that the components have seen.
    """
    data, held_out = results.data.data, results.data.validation_rows
    rows = some_rows(held_out if held_out.size else np.arange(data.n_cells), plots.MOST_DOTS)
    some = loaded(data, rows)
    of_cells = np.empty((rows.size, results.of_components.shape[1]))
    for here in by_origin(np.arange(rows.size), some.origins):
        origin = -1 if some.origins is None else int(some.origins[here[0]])
        log_mean, log_inv_disp = (t.cpu() for t in results.model.mixture.components_of(-1, origin))
        of_cells[here] = component_log_likelihood(
            some.counts[here], some.size_factors[here], log_mean, log_inv_disp, dtype=torch.float32
        ).numpy()
    weights = results.log_weights
    joint, of_groups = (group_log_joint(t, results.groups) for t in (of_cells + weights, weights))
    return plots.log_likelihood_margins(joint - of_groups, results.assignments[rows])


@under("diagnostics")
def log_mean_differences(results: Results) -> Figure:
    """Differences in expression.

    ln mu of every gene in a group minus its mean over the others, sorted.
    """
    return plots.log_mean_differences(results.profiles.log_mean.numpy(), shown=np.unique(results.assignments))


@under("diagnostics")
def marker_gene(results: Results) -> Figure:
    """A marker gene.

    Fitted distribution of its expression in every group (lines), and of the counts over size factors
    (dots), which counting widens.
    """
    gene, some = _telling_gene(results.markers), results.shown_cells
    log_mean, log_inv_disp = (t.numpy() for t in results.profiles)
    return plots.latent_distribution(
        results.data.data.gene_labels[gene],
        some.counts[:, [gene]].toarray()[:, 0],
        _column(results.offset_sizes(results.shown_rows), gene),
        results.assignments[results.shown_rows],
        log_mean[:, gene],
        log_inv_disp[:, gene],
    )


def _column(sizes: np.ndarray, gene: int) -> np.ndarray:
    """(cells,) size factors for one gene, of those of all genes or of each."""
    return sizes[:, gene if sizes.shape[1] > 1 else 0]


def _telling_gene(markers: Markers) -> int:
    """Of the groups' best markers the one that differs most surely."""
    best = markers.score.nan_to_num(0.0).argmax(1)  # (K,)
    sure = (markers.from_rest.log_fold_change / markers.from_rest.standard_error).nan_to_num(0.0)
    return int(best[sure[torch.arange(len(best)), best].argmax()])


@under("diagnostics")
def poisson_comparison(results: Results) -> Figure:
    """Poisson and negative binomial.

    Log likelihood of every gene in the cells of a group under both; genes above the line vary between
    the cells by more than counting does.
    """
    both = compare_with_poisson(results.statistics, results.basis, results.total_size)
    return plots.poisson_against_negative_binomial(
        both.poisson.numpy(), both.negative_binomial.numpy(), shown=np.unique(results.assignments)
    )
