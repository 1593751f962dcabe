"""Figures of a fit: pure functions from arrays to a `matplotlib.figure.Figure`.

No pyplot, so no global state, no display and nothing to close. Save with `figure.savefig(path)`, or hand
the figure to a logger. Components are called by their index everywhere.
"""

from nbmix.evaluation.plots.cells import (
    MOST_DOTS,
    certainty_on_embedding,
    component_sizes,
    groups_on_embedding,
    log_likelihood_margins,
    posterior_histogram,
    posterior_on_embedding,
)
from nbmix.evaluation.plots.fit import (
    held_out_curve,
    join_dendrogram,
    objective_trace,
    separation_matrix,
)
from nbmix.evaluation.plots.genes import (
    latent_distribution,
    log_mean_differences,
    marker_dots,
    poisson_against_negative_binomial,
)
from nbmix.evaluation.plots.labels import (
    component_batch_table,
    component_label_correlation,
    component_label_table,
    reliability_diagram,
)
from nbmix.evaluation.plots.style import DPI, LONGEST_NAME, PALETTE

__all__ = [
    "DPI",
    "LONGEST_NAME",
    "MOST_DOTS",
    "PALETTE",
    "certainty_on_embedding",
    "component_batch_table",
    "component_label_correlation",
    "component_label_table",
    "component_sizes",
    "groups_on_embedding",
    "held_out_curve",
    "join_dendrogram",
    "latent_distribution",
    "log_likelihood_margins",
    "log_mean_differences",
    "marker_dots",
    "objective_trace",
    "poisson_against_negative_binomial",
    "posterior_histogram",
    "posterior_on_embedding",
    "reliability_diagram",
    "separation_matrix",
]
