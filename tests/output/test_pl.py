"""nbmix.pl: what an AnnData holds is drawn, into given axes too, whatever its groups are called."""

from __future__ import annotations

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import nbmix
from nbmix.errors import InputError
from tests.helpers.estimators import EM, annotated
from tests.helpers.figures import assert_drawn, dots, legend_texts, texts, tick_texts

ALL = ("embedding", "markers", "tree", "separations", "sizes", "trace")


@pytest.fixture(scope="module")
def fitted():
    made = nbmix.cluster(annotated(), copy=True, **EM)
    made.obsm["X_umap"] = np.random.default_rng(0).normal(size=(made.n_obs, 2)).astype(np.float32)
    return made


@pytest.fixture
def adata(fitted):
    return fitted.copy()


@pytest.fixture(autouse=True)
def no_figure_stays():
    plt.close("all")  # those of examples in docstrings
    with mpl.rc_context({"backend": "agg"}):
        yield
    plt.close("all")


@pytest.mark.parametrize("name", ALL)
def test_axes_in_and_out(name, adata):
    draw = getattr(nbmix.pl, name)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    assert draw(adata, ax=right) is right
    assert right.has_data() and not left.has_data()
    assert not plt.get_fignums()  # nothing that would be shown twice
    axes = draw(adata, show=False)
    assert axes.figure is plt.gcf()
    assert_drawn(axes.figure)


@pytest.mark.parametrize(("show", "given", "shown"), [(None, False, 1), (None, True, 0), (True, True, 1)])
def test_shown_as_scanpy_does(show, given, shown, adata, monkeypatch):
    calls = []
    monkeypatch.setattr(plt, "show", lambda: calls.append(1))  # the display
    found = nbmix.pl.sizes(adata, ax=Figure().subplots() if given else None, show=show)
    assert (len(calls), found is None) == (shown, bool(shown))


def test_embedding(adata):
    axes = nbmix.pl.embedding(adata, show=False)
    np.testing.assert_array_equal(np.sort(dots(axes), axis=0), np.sort(adata.obsm["X_nbmix_umap"], axis=0))
    sizes = adata.obs["nbmix"].value_counts()
    assert legend_texts(axes) == [f"{k} ({sizes[k]})" for k in ("0", "1")]
    axes = nbmix.pl.embedding(adata, "probability", show=False)
    np.testing.assert_allclose(
        np.sort(axes.collections[0].get_array()), np.sort(adata.obs["nbmix_probability"])
    )


def drawn_colors(axes):
    return [handle.get_color() for handle in axes.get_legend().legend_handles]


def test_groups_have_the_colors_that_scanpy_gives_them(adata):
    own = adata.uns["nbmix_colors"].tolist()
    assert len(set(own)) == 2
    assert drawn_colors(nbmix.pl.embedding(adata, show=False)) == own
    adata.uns["nbmix_colors"] = np.array(["#123456", "#abcdef"])
    assert drawn_colors(nbmix.pl.embedding(adata, show=False)) == ["#123456", "#abcdef"]
    bars = nbmix.pl.sizes(adata, show=False).patches
    assert [mpl.colors.to_hex(bar.get_facecolor()) for bar in bars] == ["#123456", "#abcdef"]
    nbmix.rename(adata, {"0": "zebra"})
    assert drawn_colors(nbmix.pl.embedding(adata, show=False)) == ["#123456", "#abcdef"]
    one = adata[adata.obs["nbmix"] == "1"].copy()  # which takes a category and its colour away
    assert drawn_colors(nbmix.pl.embedding(one, show=False)) == ["#abcdef"]
    for unusable in (np.array(["#123456"]), np.array(["no colour", "#abcdef"]), None, "red", np.eye(2)):
        adata.uns["nbmix_colors"] = unusable
        assert drawn_colors(nbmix.pl.embedding(adata, show=False))[0] == own[0]
    nbmix.merge(adata, ["zebra", "1"], name="all")
    assert len(adata.uns["nbmix_colors"]) == 1


def test_the_embedding_of_the_fit_comes_first(adata):
    adata.obsm["X_nbmix_umap"] = adata.obsm["X_umap"] + 10
    adata.obsm["X_nbmix_umap"][0] = np.nan  # a cell without a place
    axes = nbmix.pl.embedding(adata, show=False)
    assert len(dots(axes)) == adata.n_obs - 1 and dots(axes).mean() > 5
    assert axes.get_xlabel() == "UMAP 1"
    adata.obsm["X_tsne"] = adata.obsm["X_umap"]
    assert nbmix.pl.embedding(adata, basis="tsne", show=False).get_xlabel() == "t-SNE 1"


@pytest.mark.parametrize("scale", ["counts", "log"])
def test_markers(adata, scale):
    present = adata.X.toarray() > 0
    if scale == "log":
        adata.X = adata.X.log1p()
    axes = nbmix.pl.markers(adata, 3, show=False)
    table = adata.uns["nbmix"]["markers"]
    genes = table[table["rank"] <= 3]["gene"].tolist()
    assert tick_texts(axes.yaxis) == genes
    rows = adata.var_names.get_indexer(genes)
    mean = np.exp(adata.varm["nbmix_log_mean"][rows])
    np.testing.assert_allclose(axes.collections[0].get_array(), (mean / mean.max(1, keepdims=True)).ravel())
    share = np.array([[present[adata.obs["nbmix"] == k, j].mean() for k in "01"] for j in rows]).ravel()
    sizes = axes.collections[0].get_sizes()
    np.testing.assert_allclose(sizes / sizes.max(), share / share.max())
    (frame, *_) = axes.patches
    assert frame.get_center().tolist() == [0.0, 0.0]


def test_markers_as_a_matrix_need_no_counts(adata):
    adata.X = None
    assert_drawn(nbmix.pl.markers(adata, kind="matrix", show=False).figure)
    with pytest.raises(InputError, match="has no X, which dots need"):
        nbmix.pl.markers(adata)


def test_trace_and_separations(adata):
    (line,) = nbmix.pl.trace(adata, show=False).lines
    assert line.get_ydata().tolist() == adata.uns["nbmix"]["objective"].tolist()
    assert line.get_xdata()[-1] == adata.uns["nbmix"]["n_iterations"]
    distance = adata.uns["nbmix"]["separations"]["separation"][0]
    assert {text.strip("()") for text in texts(nbmix.pl.separations(adata, show=False))} == {
        f"{distance:.1f}"
    }


def test_tree(adata):
    axes = nbmix.pl.tree(adata, show=False)
    n_components = adata.obsm["X_nbmix_components"].argmax(1)
    assert len(tick_texts(axes.yaxis)) == len(np.unique(n_components))
    assert len(axes.lines) == len(np.unique(n_components)) - 1


@pytest.mark.parametrize("name", ALL)
def test_from_a_file(name, adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    axes = getattr(nbmix.pl, name)(ad.read_h5ad(tmp_path / "a.h5ad"), show=False)
    own = getattr(nbmix.pl, name)(adata, show=False)
    assert tick_texts(axes.yaxis) == tick_texts(own.yaxis)
    assert texts(axes) == texts(own)


def test_groups_with_other_names(adata):
    names = {"0": "$x_1$ T", "1": "_B"}
    adata.obs["nbmix"] = adata.obs["nbmix"].cat.rename_categories(names)
    adata.uns["nbmix"]["groups"] = {names[k]: made for k, made in adata.uns["nbmix"]["groups"].items()}
    table = adata.uns["nbmix"]["markers"]
    table["component"] = table["component"].astype(str).map(names)
    shown = [r"\$x_1\$ T", " _B"]
    assert tick_texts(nbmix.pl.sizes(adata, show=False).yaxis) == shown
    assert tick_texts(nbmix.pl.markers(adata, show=False).xaxis) == shown
    assert tick_texts(nbmix.pl.separations(adata, show=False).yaxis) == shown
    leaves = tick_texts(nbmix.pl.tree(adata, show=False).yaxis)
    assert {leaf.split(":")[0] for leaf in leaves} == {f"group {name}" for name in shown}
    assert_drawn(nbmix.pl.embedding(adata, show=False).figure)


def test_groups_that_were_renamed(adata, tmp_path):
    nbmix.rename(adata, {"0": "B cells", "1": "0"})
    distance = f"{adata.uns['nbmix']['separations']['separation'][0]:.1f}"
    adata.write_h5ad(tmp_path / "a.h5ad")
    for some in (adata, ad.read_h5ad(tmp_path / "a.h5ad")):
        axes = nbmix.pl.separations(some, show=False)
        assert tick_texts(axes.yaxis) == ["B cells", "0"]
        assert {text.strip("()") for text in texts(axes)} == {distance}


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_that_are_called_alike(adata):
    adata.uns["nbmix"]["markers"]["gene"] = "g1"
    expected = nbmix.pl.markers(adata, 1, show=False).collections[0]
    adata.uns["nbmix"]["markers"]["gene"] = "g0-1"  # as the fit calls the second g0
    adata.var_names = ["g0", "g0", *adata.var_names[2:]]
    found = nbmix.pl.markers(adata, 1, show=False).collections[0]
    np.testing.assert_array_equal(found.get_array(), expected.get_array())
    np.testing.assert_array_equal(found.get_sizes(), expected.get_sizes())


@pytest.mark.parametrize("name", ["markers", "tree", "separations", "trace"])
def test_what_groups_of_a_fit_alone_have(name, adata):
    nbmix.regroup(adata, 1)
    with pytest.raises(InputError, match=r"only embedding and sizes can be drawn: give a fit's key"):
        getattr(nbmix.pl, name)(adata, key="nbmix_groups")


def test_groups_that_are_gone_are_nowhere(adata):
    some = adata[adata.obs["nbmix"] == "1"].copy()
    assert tick_texts(nbmix.pl.sizes(some, show=False).yaxis) == ["1"]
    assert tick_texts(nbmix.pl.markers(some, show=False).xaxis) == ["1"]
    assert legend_texts(nbmix.pl.embedding(some, show=False)) == [f"1 ({some.n_obs})"]
    with pytest.raises(InputError, match="no two groups"):
        nbmix.pl.separations(some)


def test_other_groups_of_the_fit(adata):
    nbmix.regroup(adata, 1)
    assert tick_texts(nbmix.pl.sizes(adata, key="nbmix_groups", show=False).yaxis) == ["0"]
    with pytest.raises(InputError, match=r"lacks varm\['nbmix_groups_log_mean'\]"):
        nbmix.pl.markers(adata, key="nbmix_groups")


def without(kind, *names):
    def change(adata):
        for name in names:
            del getattr(adata, kind)[name]

    return change


def other_groups(adata):
    adata.obs["nbmix"] = pd.Categorical(["0"] * adata.n_obs)


def scaled(adata):
    adata.X = adata.X.toarray() - 1.0


@pytest.mark.parametrize(
    ("change", "draw", "words"),
    [
        (without("obs", "nbmix"), "sizes", r"has no obs\['nbmix'\] with obsm\['X_nbmix'\]"),
        (other_groups, "sizes", "is not the group of the largest probability"),
        (without("obsm", "X_umap", "X_nbmix_umap"), "embedding", "X_tsne, X_pca; run scanpy"),
        (scaled, "markers", "X is scaled"),
        (without("uns", "nbmix"), "trace", "has no objective"),
        (without("uns", "nbmix"), "tree", "has no joins; fit with folds"),
        (without("uns", "nbmix"), "markers", "has no markers; run nbmix.cluster"),
    ],
)
def test_what_is_missing_is_named(change, draw, words, adata):
    change(adata)
    with pytest.raises(InputError, match=words):
        getattr(nbmix.pl, draw)(adata)


@pytest.mark.parametrize(
    ("draw", "arguments", "words"),
    [
        ("embedding", {"color": "leiden"}, "color='leiden': must be 'group' or 'probability'"),
        ("embedding", {"basis": "tsne"}, "none of tsne, X_tsne; it has 'prior', 'X_nbmix'"),
        ("markers", {"kind": "violin"}, "kind='violin'"),
        ("markers", {"layer": "raw"}, r"layer=raw: adata has the layers \(none\)"),
        ("markers", {"n_genes": 0}, "n_genes=0"),
        ("sizes", {"ax": Figure()}, "ax is a Figure"),
        ("sizes", {"key": "leiden"}, r"has no obs\['leiden'\]"),
    ],
)
def test_arguments_that_cannot_be_used(draw, arguments, words, adata):
    with pytest.raises(InputError, match=words):
        getattr(nbmix.pl, draw)(adata, **arguments)


def test_something_else_than_an_anndata():
    with pytest.raises(InputError, match="adata is a dict"):
        nbmix.pl.sizes({})
