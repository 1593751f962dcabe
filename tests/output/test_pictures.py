"""Each picture shows what the results hold, or is not there."""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name

import numpy as np
import pytest
from omegaconf import OmegaConf

from nbmix.evaluation.plots.interactive import InteractiveCells
from nbmix.output import pictures
from nbmix.output.pictures import section_of, title_and_caption
from nbmix.output.results import named_markers
from nbmix.starts.choice import Choice
from tests.helpers.figures import assert_drawn, dots, heights, legend_texts, texts, tick_texts
from tests.helpers.results import results_of
from tests.helpers.running import ROOT, small_data

CONFIGURED = OmegaConf.load(ROOT / "conf/config.yaml").evaluation.pictures
OF_LABELS = {"component_label_table", "component_label_correlation", "reliability"}


@pytest.fixture(scope="module")
def results():
    data = small_data()
    made = results_of(replace(data, origins=np.arange(data.n_cells) % 2, origin_names=("a", "b")))
    made.max_umap_cells = 0
    curve = np.array([-12.0, -10.0, -9.5])
    made.model.choice = Choice(np.array([1, 2, 3]), curve, np.array([0.0, 0.1, 0.1]), 2, None).plain
    return made


@pytest.mark.parametrize("name", CONFIGURED)
def test_every_picture_of_the_config_is_drawn(name, results):
    draw = resolve_name(name)
    drawn = draw(results)
    if isinstance(drawn, InteractiveCells):  # a browser draws it in the tests of the report
        assert len(drawn.groups) == 2
    else:
        assert_drawn(drawn)
    assert section_of(draw) in ("cells", "markers", "groups", "diagnostics")
    title, caption = title_and_caption(draw)
    assert title and caption and "\n" not in title + caption and not title.endswith(".")


def test_pictures_that_need_what_there_is_not(unlabelled):
    names = {*OF_LABELS, "n_components", "component_batch_table"}
    assert {name for name in names if getattr(pictures, name)(unlabelled) is None} == names


def test_a_function_without_words_has_its_name():
    def donors(results):
        return None

    assert title_and_caption(donors) == ("donors", "")


def test_n_components(results):
    (axes,) = pictures.n_components(results).axes
    assert axes.lines[0].get_ydata().tolist() == [-12.0, -10.0, -9.5]
    assert axes.get_title(loc="left") == "recommended: 2 components"


def test_objective_trace(results):
    (line,) = pictures.objective_trace(results).axes[0].lines
    objective = results.model.objective
    assert line.get_ydata().tolist() == objective
    assert line.get_xdata().tolist()[-1] == results.model.n_iterations == 2
    assert len(line.get_xdata()) == len(objective)


def test_component_sizes(results):
    (axes,) = pictures.component_sizes(results).axes
    assert [bar.get_width() for bar in axes.patches] == np.bincount(results.assignments).tolist()


def test_posterior_embedding(results):
    left, right = pictures.posterior_embedding(results).axes
    for axes in (left, right):
        np.testing.assert_array_equal(
            np.sort(dots(axes), axis=0), np.sort(results.embedding.coordinates, axis=0)
        )
    assert legend_texts(left) == [
        f"{name} ({n})" for name, n in zip(*np.unique(small_data().labels, return_counts=True), strict=True)
    ]
    assert right.get_xlabel() == "PCA 1"


def test_the_same_cells_for_the_browser(results):
    drawn = pictures.interactive_embedding(results)
    assert [size for _, _, size in drawn.groups] == np.bincount(results.assignments).tolist()


def test_certainty_embedding(results):
    axes = pictures.certainty_embedding(results).axes[0]
    np.testing.assert_allclose(
        np.sort(axes.collections[0].get_array()), np.sort(results.responsibilities.max(1))
    )


def test_marker_dots(results):
    axes = pictures.marker_dots(results).axes[0]
    table = named_markers(results)
    genes = table[table["rank"] <= 5]["gene"].tolist()
    assert tick_texts(axes.yaxis) == genes
    assert tick_texts(axes.xaxis) == ["0", "1"]
    sizes = axes.collections[0].get_sizes().reshape(10, 2)
    counts = results.data.data.counts.toarray() > 0
    rows = [results.data.data.gene_names.tolist().index(gene) for gene in genes]
    share = np.array([[counts[results.assignments == k, j].mean() for k in (0, 1)] for j in rows])
    np.testing.assert_allclose(sizes / sizes.max(), share / share.max(), atol=1e-3)
    first = axes.collections[0].get_array().reshape(10, 2)[:5]
    assert (first[:, 0] == 1).all()  # where its own markers are highest


EMPTY = "1"


@pytest.fixture(scope="module")
def with_an_empty_group():
    """Four components, one of which has no cell; a group each."""
    made = results_of(small_data(), n_components=4)
    cells = made.cells.responsibilities
    cells[:, 1] = 0.0
    cells[:] = cells / cells.sum(1, keepdim=True).clamp(min=1e-30)
    cells[cells.sum(1) == 0, 0] = 1.0
    made.max_umap_cells = 0
    return made


@pytest.fixture(scope="module")
def alone():
    made = results_of(small_data(), n_components=1, folds=1)
    made.max_umap_cells = 0
    return made


@pytest.mark.parametrize("name", CONFIGURED)
def test_every_picture_of_one_group(name, alone):
    drawn = resolve_name(name)(alone)
    if isinstance(drawn, InteractiveCells):
        assert len(drawn.groups) == 1
    elif drawn is not None:
        assert drawn.axes


@pytest.mark.parametrize("name", CONFIGURED)
def test_groups_without_cells_are_nowhere(name, with_an_empty_group):
    drawn = resolve_name(name)(with_an_empty_group)
    if isinstance(drawn, InteractiveCells):
        assert EMPTY not in [group for group, _, _ in drawn.groups]
    elif drawn is not None:
        for axes in drawn.axes:
            legend = axes.get_legend()
            words = [text.get_text() for text in legend.get_texts()] if legend else []
            words += [axes.get_title(loc="left").split("\n")[0]]
            if axes.get_xlabel().startswith("group"):
                words += tick_texts(axes.xaxis)
            if axes.get_ylabel() == "group":
                words += tick_texts(axes.yaxis)
            assert not any(word == EMPTY or word.startswith(f"{EMPTY} (") for word in words)


def test_component_label_table(results):
    axes = pictures.component_label_table(results).axes[0]
    one, other = np.unique(small_data().labels, return_counts=True)[1]
    assert texts(axes) == [str(one), "0", "0", str(other)]  # all are found
    assert tick_texts(axes.yaxis) == np.unique(small_data().labels).tolist()


def test_component_label_correlation(results):
    image = pictures.component_label_correlation(results).axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), [[1, -1], [-1, 1]], atol=1e-3)


def test_posterior_histogram(results):
    assert sum(heights(pictures.posterior_histogram(results).axes[0])) == 60


def test_reliability(results):
    top, bottom = pictures.reliability(results).axes
    assert [text.split(":")[0] for text in legend_texts(top)] == ["posterior", "tempered"]
    assert sum(heights(bottom)[:15]) == sum(heights(bottom)[15:]) == 60
    seen = results_of(small_data(), epochs=1, folds=1, validation_share=0.0)
    top, _ = pictures.reliability(seen).axes
    assert [text.split(":")[0] for text in legend_texts(top)] == ["posterior"]


def test_log_likelihood_margins_are_of_held_out_cells(results, unlabelled):
    held_out = results.data.validation_rows
    (axes,) = pictures.log_likelihood_margins(results).axes
    assert 0 < len(held_out) < 60
    assert len(dots(axes)) == len(held_out)
    (axes,) = pictures.log_likelihood_margins(results_of(small_data(), validation_share=0.0)).axes
    assert len(dots(axes)) == 60


def test_log_mean_differences(results):
    _, line = pictures.log_mean_differences(results).axes[0].lines
    one, other = results.profiles.log_mean.numpy()
    np.testing.assert_allclose(line.get_ydata(), np.sort(one - other))


def test_marker_gene_is_one_that_differs(results):
    top, bottom = pictures.marker_gene(results).axes
    gene = results.data.data.gene_names.tolist().index(top.get_title(loc="left"))
    best = results.markers.score.argmax(1)
    assert gene in best
    assert sum(heights(top)) == 60
    medians = [np.interp(0.5, line.get_ydata(), line.get_xdata()) for line in bottom.lines[::2]]
    order = results.profiles.log_mean[:, gene].argsort()
    assert np.argsort(medians).tolist() == order.tolist()


def test_poisson_comparison(results):
    for axes in pictures.poisson_comparison(results).axes:
        lost = dots(axes)
        assert len(lost) > 30
        assert (lost[:, 1] <= lost[:, 0] + 1e-3).all()  # a Poisson is a negative binomial
