import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import gamma

from nbmix.evaluation import plots
from nbmix.evaluation.calibration import expected_calibration_error, reliability
from nbmix.evaluation.metrics import overlap_table


def responsibilities(n_cells: int, n_components: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(n_components, 0.2), n_cells)


def pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    buffer.seek(0)
    return imread(buffer)[..., :3]


def assert_drawn(figure: Figure) -> None:
    assert pixels(figure).std() > 0.01


def legend_texts(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


SIZES = [(1, 1), (1, 30), (40, 1), (40, 2), (200, 30)]


def test_palette_has_thirty_distinct_colors_and_then_repeats():
    assert len(set(plots.PALETTE)) == len(plots.PALETTE) == 30
    assert plots._colors(31)[30] == plots.PALETTE[0]


def test_objective_trace():
    series = {"training objective": [-3.0, -2.0, -1.5], "held-out log likelihood": [np.nan, -2.5, np.nan]}
    figure = plots.objective_trace([1, 2, 3], series)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == legend_texts(axes) == list(series)
    assert axes.lines[0].get_ydata().tolist() == [-3.0, -2.0, -1.5]
    assert axes.lines[1].get_xdata().tolist() == [2]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "nats per cell")
    assert_drawn(figure)


@pytest.mark.parametrize("series", [{}, {"one": [-1.0]}, {"none yet": [np.nan]}])
def test_objective_trace_of_one_step(series):
    assert_drawn(plots.objective_trace([1], series))


def test_component_label_table_lies_on_the_diagonal():
    table = np.array([[0, 2, 9], [8, 0, 0]])
    figure = plots.component_label_table(["B", "T"], table)
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "0", "1"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["B", "T"]
    assert [text.get_text() for text in axes.texts] == ["9", "0", "2", "0", "8", "0"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[9 / 11, 0, 2 / 11], [0, 1, 0]])
    assert_drawn(figure)


@pytest.mark.parametrize(("n_labels", "n_components"), [(1, 1), (1, 30), (30, 1), (12, 30)])
def test_component_label_table_at_the_edges(n_labels, n_components):
    names = [f"a very long cell type name, number {i}, activated" for i in range(n_labels)]
    table = np.random.default_rng(0).integers(0, 20, (n_labels, n_components))
    table[0] = 0
    figure = plots.component_label_table(names, table)
    assert len(figure.axes[0].texts) == table.size
    assert all(len(tick.get_text()) <= plots.LONGEST_NAME for tick in figure.axes[0].get_yticklabels())
    assert_drawn(figure)


def test_component_sizes():
    figure = plots.component_sizes([[0.9, 0.1, 0.0], [0.7, 0.3, 0.0], [0.4, 0.6, 0.0]])
    top, bottom = figure.axes
    assert [bar.get_height() for bar in top.patches] == [2, 1, 0]
    assert [bar.get_height() for bar in bottom.patches] == pytest.approx([0.8, 0.6, 0.0])
    assert (top.get_ylabel(), bottom.get_xlabel()) == ("cells", "component")
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
def test_component_sizes_at_the_edges(n_cells, n_components):
    figure = plots.component_sizes(responsibilities(n_cells, n_components))
    assert len(figure.axes[0].patches) == n_components
    assert_drawn(figure)


def test_posterior_is_the_opacity():
    coordinates = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
    figure = plots.posterior_on_embedding("UMAP", coordinates, [[1.0, 0.0], [0.4, 0.6], [0.8, 0.2]])
    (axes,) = figure.axes
    points = axes.collections[0]
    order = np.asarray(points.get_offsets())[:, 0].astype(int)
    colors = points.get_facecolor()[np.argsort(order)]
    np.testing.assert_allclose(colors[:, 3] / colors[0, 3], [1.0, 0.6, 0.8])
    assert [to_hex(color) for color in colors] == [plots.PALETTE[k] for k in (0, 1, 0)]
    assert legend_texts(axes) == ["0 (2)", "1 (1)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("UMAP 1", "UMAP 2")
    assert [text.get_text() for text in axes.texts] == ["0", "1"]
    assert_drawn(figure)


def test_labels_take_the_color_of_their_component():
    coordinates = np.arange(8.0).reshape(4, 2)
    labels = np.array(["b", "b", "a", "c"])
    figure = plots.posterior_on_embedding("PCA", coordinates, np.eye(2)[[0, 0, 1, 1]], labels)
    left, right = figure.axes
    assert legend_texts(left) == ["a (1)", "b (2)", "c (1)"]
    assert legend_texts(right) == ["0 (2)", "1 (2)"]
    order = np.argsort(np.asarray(left.collections[0].get_offsets())[:, 0])
    hexes = [to_hex(color) for color in left.collections[0].get_facecolor()[order]]
    assert hexes[0] == hexes[1] == plots.PALETTE[0]
    assert sorted(hexes[2:]) == sorted(plots.PALETTE[1:3])
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
@pytest.mark.parametrize("labelled", [False, True])
def test_posterior_on_embedding_at_the_edges(n_cells, n_components, labelled):
    labels = np.array([f"a very long cell type name, number {i % 25}" for i in range(n_cells)])
    coordinates = np.random.default_rng(0).normal(size=(n_cells, 2)).astype(np.float32)
    figure = plots.posterior_on_embedding(
        "PCA", coordinates, responsibilities(n_cells, n_components), labels if labelled else None
    )
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes] == [n_cells] * (1 + labelled)
    assert len(legend_texts(figure.axes[-1])) == n_components
    assert_drawn(figure)


def test_points_shrink_and_pale_with_their_number():
    def drawn(n_cells):
        points = plots.posterior_on_embedding("PCA", np.zeros((n_cells, 2)), np.ones((n_cells, 1))).axes[0]
        return points.collections[0].get_sizes()[0], points.collections[0].get_facecolor()[0, 3]

    few, many = drawn(100), drawn(100_000)
    assert few[0] > many[0] > 0
    assert few[1] > many[1] > 0


def test_log_mean_differences_of_three():
    log_mean = np.array([[0.0, 3.0, -np.inf], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    figure = plots.log_mean_differences(log_mean, ["x", "y", "z"])
    (axes,) = figure.axes
    zero, *lines = axes.lines
    assert list(zero.get_ydata()) == [0.0, 0.0]
    np.testing.assert_allclose([line.get_ydata() for line in lines], [[-1.5, 3.0], [-1.5, 0.0], [-1.5, 1.5]])
    assert lines[0].get_xdata().tolist() == [1, 2]
    assert legend_texts(axes) == ["x", "y", "z"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gene rank", r"difference in $\ln \mu$")
    assert_drawn(figure)


def test_log_mean_differences_of_two_is_one_line():
    (axes,) = plots.log_mean_differences([[1.0, 2.0], [0.5, 4.0]]).axes
    assert len(axes.lines) == 2
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [-2.0, 0.5])
    assert legend_texts(axes) == ["0 minus 1"]


@pytest.mark.parametrize(("n_components", "n_genes"), [(1, 5), (2, 1), (30, 50), (3, 0)])
def test_log_mean_differences_at_the_edges(n_components, n_genes):
    log_mean = np.random.default_rng(0).normal(-9, 1, (n_components, n_genes))
    figure = plots.log_mean_differences(log_mean)
    if n_components == 1:
        assert "one component" in figure.axes[0].texts[0].get_text()
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
def test_posterior_histogram_counts_every_cell(n_cells, n_components):
    figure = plots.posterior_histogram(responsibilities(n_cells, n_components).astype(np.float32))
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == n_cells
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "largest posterior probability of the cell"
    assert_drawn(figure)


def test_posterior_histogram_of_undecided_cells():
    (axes,) = plots.posterior_histogram(np.full((7, 3), 1 / 3, dtype=np.float32)).axes
    assert axes.patches[0].get_height() == 7


def test_overlap_table_feeds_the_heat_map():
    found = responsibilities(50, 4).argmax(axis=1)
    labels = np.random.default_rng(1).integers(0, 3, 50)
    assert_drawn(plots.component_label_table(*overlap_table(labels, found, 4)))


def test_other_groupings_have_panels_between_labels_and_components():
    coordinates = np.arange(8.0).reshape(4, 2)
    others = {"Leiden": np.array(["1", "1", "0", "0"])}
    figure = plots.posterior_on_embedding(
        "PCA", coordinates, np.eye(2)[[0, 0, 1, 1]], ["b", "b", "a", "a"], others
    )
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["labels", "Leiden"]
    assert len(figure.axes) == 3
    assert legend_texts(figure.axes[1]) == ["0 (2)", "1 (2)"]
    for axes in figure.axes:  # the same cells, the same colours
        order = np.argsort(np.asarray(axes.collections[0].get_offsets())[:, 0])
        hexes = [to_hex(color) for color in axes.collections[0].get_facecolor()[order]]
        assert hexes == [plots.PALETTE[k] for k in (0, 0, 1, 1)]


def test_short_names_are_written_where_their_cells_are():
    coordinates = np.array([[0.0, 0.0], [0.0, 0.0], [5.0, 1.0], [5.0, 1.0]])
    names = ["cytotoxic_t", "cytotoxic_t", "b_cells", "b_cells"]
    others = {"Leiden": np.array([12, 12, 3, 3])}
    figure = plots.posterior_on_embedding("PCA", coordinates, np.eye(2)[[0, 0, 1, 1]], names, others)
    marks = [{text.get_text(): text.get_position() for text in axes.texts} for axes in figure.axes]
    places = [(0.0, 0.0), (5.0, 1.0)]
    assert marks == [{}, dict(zip(("12", "3"), places, strict=True)), dict(zip("01", places, strict=True))]


def test_poisson_against_negative_binomial():
    poisson = np.array([[-30.0, -20.0, 0.0], [-5.0, -1e-3, -8.0]])
    gain = np.array([[10.0, 0.0, 0.0], [1.0, 0.0, 0.5]])
    figure = plots.poisson_against_negative_binomial(poisson, poisson + gain, ["B", "T"])
    left, right = figure.axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["B\ngain 10 nats", "T\ngain 2 nats"]
    np.testing.assert_allclose(left.collections[0].get_offsets(), [[30, 20], [20, 20]])
    np.testing.assert_allclose(right.collections[0].get_offsets(), [[5, 4], [8, 7.5]])
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
    assert sum(axes.get_visible() for axes in figure.axes) == n_components
    assert_drawn(figure)
    assert_drawn(plots.poisson_against_negative_binomial(0 * values, 0 * values))


def test_log_likelihood_margins():
    log_likelihood = np.array([[-10.0, -15.0, -30.0], [-9.0, -9.5, -20.0], [-50.0, -5.0, -8.0]])
    figure = plots.log_likelihood_margins(log_likelihood, [0, 1, 1])
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.collections[0].get_offsets()[:, 1], [5.0, -0.5, 3.0])
    colors = [to_hex(color) for color in axes.collections[0].get_facecolor()]
    assert colors == [plots.PALETTE[k] for k in (0, 1, 1)]
    assert [text.get_text() for text in axes.texts] == ["0", "1"]
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), [*SIZES, (20_000, 3)])
def test_log_likelihood_margins_at_the_edges(n_cells, n_components):
    values = np.random.default_rng(0).normal(-1000, 50, (n_cells, n_components))
    figure = plots.log_likelihood_margins(values, values.argmax(1))
    (axes,) = figure.axes
    if n_components == 1:
        assert "one component" in axes.texts[0].get_text()
    else:
        points = axes.collections[0].get_offsets()
        assert len(points) == min(n_cells, plots.MOST_DOTS)
        assert (points[:, 1] >= 0).all()
    assert_drawn(figure)


def test_component_label_correlation():
    rng = np.random.default_rng(0)
    labels = rng.choice(["B", "NK", "T"], 60)
    posterior = responsibilities(60, 4)
    figure = plots.component_label_correlation(labels, posterior)
    axes = figure.axes[0]
    order = [int(tick.get_text()) for tick in axes.get_xticklabels()]
    assert sorted(order) == [0, 1, 2, 3]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["B", "NK", "T"]
    wanted = np.corrcoef(np.vstack([[labels == name for name in names], posterior[:, order].T]))[:3, 3:]
    np.testing.assert_allclose(axes.images[0].get_array(), wanted, atol=1e-12)
    assert_drawn(figure)


def test_no_correlation_is_minus_nothing():
    first = np.array([0.9, 0.1, 0.9, 0.099])
    axes = plots.component_label_correlation(["a", "a", "b", "b"], np.stack([first, 1 - first], 1)).axes[0]
    assert axes.images[0].get_array().min() < 0
    assert {text.get_text() for text in axes.texts} == {"0.00"}


def test_a_component_that_is_nowhere_probable_has_no_correlation():
    posterior = np.column_stack([np.eye(2)[[0, 0, 1]], np.zeros(3)])
    axes = plots.component_label_correlation(["a", "a", "b"], posterior).axes[0]
    np.testing.assert_allclose(
        np.ma.filled(axes.images[0].get_array(), np.nan), [[1, -1, np.nan], [-1, 1, np.nan]]
    )
    assert len(axes.texts) == 4
    assert_drawn(plots.component_label_correlation(["a", "a", "a"], posterior))


def test_latent_distribution():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 500)
    mean, shape = np.array([1e-3, 1e-2]), np.array([2.0, 20.0])
    sizes = np.append(np.full(999, 1e5), 0.0)
    counts = rng.poisson(sizes * rng.gamma(shape[groups], mean[groups] / shape[groups]))
    figure = plots.latent_distribution("CD74", counts, sizes, groups, np.log(mean), np.log(shape), ["T", "B"])
    top, bottom = figure.axes
    assert top.get_title(loc="left") == "CD74"
    assert sum(bar.get_height() for bar in top.patches) == 999  # the empty cell is left out
    assert legend_texts(bottom) == ["T", "B"]
    for k, (line, dots) in enumerate(zip(bottom.lines[::2], bottom.lines[1::2], strict=True)):
        x, y = line.get_data()
        np.testing.assert_allclose(y, gamma.cdf(x, shape[k], scale=mean[k] / shape[k]), atol=1e-12)
        at, below = dots.get_data()
        some = groups[:-1] == k
        wanted = [(counts[:-1][some] / 1e5 <= value).mean() for value in at]
        np.testing.assert_allclose(below, wanted)
        # so many molecules that counting hardly widens the distribution
        assert np.abs(below - gamma.cdf(at, shape[k], scale=mean[k] / shape[k])).max() < 0.08
    assert_drawn(figure)


@pytest.mark.parametrize(("n_cells", "n_components"), SIZES)
@pytest.mark.parametrize("most", [0, 5000])
def test_latent_distribution_at_the_edges(n_cells, n_components, most):
    rng = np.random.default_rng(0)
    figure = plots.latent_distribution(
        "a very long gene name, with a version and a comment",
        rng.integers(0, most + 1, n_cells),
        np.full(n_cells, 1e3),
        rng.integers(0, n_components, n_cells),
        np.full(n_components, -18.0),
        np.linspace(-8, 12, n_components),
    )
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == n_cells
    assert len(legend_texts(figure.axes[1])) == n_components
    assert_drawn(figure)


def test_held_out_curve():
    figure = plots.held_out_curve([3, 2, 4, 3], [-9.0, -10.0, -9.5, -8.0], [0.1, 0.1, 0.1, 0.1])
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata().tolist() == [2, 3, 4]
    assert axes.lines[0].get_ydata().tolist() == [-10.0, -8.0, -9.5]
    assert axes.get_title(loc="left") == "best: 3 components"
    assert_drawn(figure)
    assert_drawn(plots.held_out_curve([5], [-1.0]))
    (axes,) = plots.held_out_curve([1, 2, 3], [-9.0, -3.0, -2.9], recommended=2).axes
    assert axes.get_title(loc="left") == "recommended: 2 components"
    assert axes.collections[-1].get_offsets().tolist() == [[2.0, -3.0]]


def test_reliability_diagram():
    sure, right = np.array([0.6, 0.62, 0.99, 0.99]), np.array([True, False, True, True])
    bins = reliability(sure, right, n_bins=5)
    figure = plots.reliability_diagram(
        {"posterior": bins, "tempered": reliability(sure / 2, right, n_bins=5)}
    )
    top, bottom = figure.axes
    assert top.lines[1].get_xdata().tolist() == pytest.approx([0.6, 0.62, 0.99])
    assert top.lines[1].get_ydata().tolist() == [1.0, 0.0, 1.0]
    error = expected_calibration_error(sure, right, n_bins=5)
    assert legend_texts(top)[0] == f"posterior: expected calibration error {error:.3f}"
    assert [patch.get_height() for patch in bottom.patches[:5]] == [0, 0, 1, 1, 2]
    assert_drawn(figure)


def test_reliability_diagram_of_no_cells():
    assert_drawn(plots.reliability_diagram({"posterior": reliability([], [])}))
