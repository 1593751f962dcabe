"""Each picture shows what the results hold, or is not there."""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name

import numpy as np
import pytest
from omegaconf import OmegaConf

from nbmix.output import pictures
from nbmix.output.pictures import title_and_caption
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
    assert_drawn(draw(results))
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
    top, _ = pictures.component_sizes(results).axes
    assert heights(top) == np.bincount(results.assignments).tolist()


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
