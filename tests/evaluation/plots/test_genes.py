"""Pictures of genes: sorted differences, two log likelihoods, one gene's distributions."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy.stats import gamma

from nbmix.evaluation import plots
from tests.helpers.figures import assert_drawn, dots, heights, legend_texts, texts, tick_texts
from tests.helpers.posteriors import SIZES


def test_log_mean_differences_of_three():
    log_mean = np.array([[0.0, 3.0, -np.inf], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    figure = plots.log_mean_differences(log_mean, ["x", "y", "z"])
    (axes,) = figure.axes
    zero, *lines = axes.lines
    assert list(zero.get_ydata()) == [0.0, 0.0]
    np.testing.assert_allclose([line.get_ydata() for line in lines], [[-1.5, 3.0], [-1.5, 0.0], [-1.5, 1.5]])
    assert lines[0].get_xdata().tolist() == [1, 2]
    assert [to_hex(line.get_color()) for line in lines] == list(plots.PALETTE[:3])
    assert legend_texts(axes) == ["x", "y", "z"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gene rank", r"difference in $\ln \mu$")
    assert_drawn(figure)


def test_log_mean_differences_of_two_is_one_line():
    (axes,) = plots.log_mean_differences([[1.0, 2.0], [0.5, 4.0]]).axes
    assert len(axes.lines) == 2
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [-2.0, 0.5])
    assert legend_texts(axes) == ["0 minus 1"]


def test_log_mean_differences_of_one_are_words():
    figure = plots.log_mean_differences(np.zeros((1, 5)))
    assert texts(figure.axes[0]) == ["one group: nothing to compare with"]
    assert not figure.axes[0].lines
    assert_drawn(figure)


@pytest.mark.parametrize(("n_components", "n_genes"), [(2, 1), (30, 50), (3, 0)])
def test_log_mean_differences_at_the_edges(n_components, n_genes):
    log_mean = np.random.default_rng(0).normal(-9, 1, (n_components, n_genes))
    figure = plots.log_mean_differences(log_mean)
    _, *lines = figure.axes[0].lines
    assert len(lines) == (1 if n_components == 2 else n_components)
    for k, line in enumerate(lines):
        rest = np.delete(log_mean, k, axis=0).mean(0)
        np.testing.assert_allclose(line.get_ydata(), np.sort(log_mean[k] - rest), atol=1e-12)
    assert_drawn(figure)


def test_components_that_are_not_shown_take_no_part():
    log_mean = np.array([[1.0, 2.0], [50.0, -50.0], [0.5, 4.0]])
    (axes,) = plots.log_mean_differences(log_mean, shown=[0, 2]).axes
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [-2.0, 0.5])
    assert legend_texts(axes) == ["0 minus 2"]
    lost = np.full((3, 2), -30.0)
    panels = plots.poisson_against_negative_binomial(lost, lost + 1.0, shown=[0, 2]).axes
    assert [axes.get_title(loc="left")[0] for axes in panels] == ["0", "2"]
    assert to_hex(panels[1].collections[0].get_facecolor()[0]) == plots.PALETTE[2]


def test_marker_dots():
    log_mean = np.log([[4.0, 1.0, 2.0], [1e-9, 3.0, 0.3]])
    share = np.array([[1.0, 0.25, 0.5], [0.0, 0.81, 0.04]])
    figure = plots.marker_dots(["CD3$D$", "LYZ"], [0, 1], log_mean, share, ["CD4 T", "mono", "B"])
    axes = figure.axes[0]
    np.testing.assert_array_equal(dots(axes), [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]])
    np.testing.assert_allclose(axes.collections[0].get_array(), [1, 0.25, 0.5, 0, 1, 0.1], atol=1e-9)
    sizes = axes.collections[0].get_sizes()
    np.testing.assert_allclose(sizes / sizes[0], share.ravel())
    assert [frame.get_center().tolist() for frame in axes.patches] == [[0.0, 0.0], [1.0, 1.0]]
    assert tick_texts(axes.yaxis) == [r"CD3\$D\$", "LYZ"]
    assert tick_texts(axes.xaxis) == ["CD4 T", "mono", "B"]
    assert legend_texts(axes) == ["25%", "50%", "100%"]
    assert axes.get_ylim() == (1.5, -0.5)
    assert_drawn(figure)


def test_markers_as_a_matrix():
    figure = plots.marker_dots(["a"], [1], np.log([[1.0, 4.0]]))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[0.25, 1.0]])
    assert_drawn(figure)


def test_poisson_against_negative_binomial():
    poisson = np.array([[-30.0, -20.0, 0.0], [-5.0, -1e-3, -8.0]])
    gain = np.array([[10.0, 0.0, 0.0], [1.0, 0.0, 0.5]])
    figure = plots.poisson_against_negative_binomial(poisson, poisson + gain, ["B", "T"])
    left, right = figure.axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["B\ngain 10 nats", "T\ngain 2 nats"]
    np.testing.assert_allclose(dots(left), [[30, 20], [20, 20]])
    np.testing.assert_allclose(dots(right), [[5, 4], [8, 7.5]])
    assert left.get_xlim()[0] > left.get_xlim()[1] > 0  # from bad to good
    assert_drawn(figure)
    for label in figure.texts:  # both names fit
        extent = label.get_window_extent()
        assert (extent.min >= 0).all()
        assert (extent.max <= figure.bbox.max).all()


@pytest.mark.parametrize("n_components", [1, 7])
def test_poisson_against_negative_binomial_at_the_edges(n_components):
    values = -np.random.default_rng(0).exponential(20, (n_components, 50))
    figure = plots.poisson_against_negative_binomial(values, values)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    for axes, lost in zip(shown, -values, strict=True):
        np.testing.assert_allclose(dots(axes), np.repeat(lost[lost > 2, None], 2, axis=1))
    assert_drawn(figure)


def test_silent_genes_have_no_dot():
    figure = plots.poisson_against_negative_binomial(np.zeros((2, 5)), np.zeros((2, 5)))
    for axes in figure.axes:
        assert not len(dots(axes))
        assert axes.get_title(loc="left").endswith("gain 0 nats")
    assert_drawn(figure)  # the line of equal likelihoods


def test_latent_distribution():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 500)
    mean, shape = np.array([1e-3, 1e-2]), np.array([2.0, 20.0])
    sizes = np.append(np.full(999, 1e5), 0.0)
    counts = rng.poisson(sizes * rng.gamma(shape[groups], mean[groups] / shape[groups]))
    figure = plots.latent_distribution("CD74", counts, sizes, groups, np.log(mean), np.log(shape), ["T", "B"])
    top, bottom = figure.axes
    assert top.get_title(loc="left") == "CD74"
    assert sum(heights(top)) == 999  # the empty cell is left out
    assert legend_texts(bottom) == ["T", "B"]
    for k, (line, empirical) in enumerate(zip(bottom.lines[::2], bottom.lines[1::2], strict=True)):
        x, y = line.get_data()
        np.testing.assert_allclose(y, gamma.cdf(x, shape[k], scale=mean[k] / shape[k]), atol=1e-12)
        at, below = empirical.get_data()
        some = groups[:-1] == k
        wanted = [(counts[:-1][some] / 1e5 <= value).mean() for value in at]
        np.testing.assert_allclose(below, wanted)
        assert to_hex(line.get_color()) == to_hex(empirical.get_color()) == plots.PALETTE[k]
        # so many molecules that counting hardly widens the distribution
        assert np.abs(below - gamma.cdf(at, shape[k], scale=mean[k] / shape[k])).max() < 0.08
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
@pytest.mark.parametrize("most", [0, 5000])
def test_latent_distribution_at_the_edges(n_cells, n_components, most):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, n_components, n_cells)
    figure = plots.latent_distribution(
        "a very long gene name, with a version and a comment",
        rng.integers(0, most + 1, n_cells),
        np.full(n_cells, 1e3),
        groups,
        np.full(n_components, -18.0),
        np.linspace(-8, 12, n_components),
    )
    top, bottom = figure.axes
    assert sum(heights(top)) == n_cells
    assert len(legend_texts(bottom)) == len(set(groups))  # none without cells
    assert len(bottom.lines) == 2 * len(set(groups))
    assert_drawn(figure)
