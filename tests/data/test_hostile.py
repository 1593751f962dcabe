"""Broken files are read right, or refused by one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbmix.data.files import HEAP
from nbmix.data.from_anndata import make_count_data
from nbmix.data.read import read_h5ad
from nbmix.errors import InputError
from tests.helpers.files import KINDS, N_CELLS, N_GENES, cases, check, counts, dense_from_parts, write_h5ad

N_CASES = 30  # of each kind


@pytest.mark.filterwarnings("default")  # of the libraries, about what is broken
@pytest.mark.parametrize("name", KINDS)
def test_random_damage(name, tmp_path):
    outcomes = {check(KINDS[name], path) for _, path in cases(KINDS[name], tmp_path, N_CASES, seed=0)}
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_whole_is_read(name, tmp_path):
    kind = KINDS[name]
    kind.write(tmp_path / "good")
    assert check(kind, tmp_path / "good") == "read"
    np.testing.assert_array_equal(kind.plain(tmp_path / "good"), counts())


SMALL = st.integers(-2, 6)
BOUNDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@BOUNDED
@given(
    data=st.lists(st.sampled_from([1.0, 2.0, 3.0, 0.0]), max_size=6),
    indices=st.lists(SMALL, max_size=6),
    indptr=st.lists(SMALL, max_size=5),
    backed=st.booleans(),
)
def test_pointers_of_a_matrix_in_a_file(tmp_path, data, indices, indptr, backed):
    """Any at all: the counts that they mean, or a refusal."""
    path = tmp_path / "counts.h5ad"
    shape = (3, 4)
    ad.AnnData(sp.csr_matrix(np.ones(shape, np.float32))).write_h5ad(path)
    parts = [np.array(data, "f4"), np.array(indices, "i4"), np.array(indptr, "i4")]
    with h5py.File(path, "r+") as file:
        for name, part in zip(("data", "indices", "indptr"), parts, strict=True):
            del file[f"X/{name}"]
            file[f"X/{name}"] = part
    try:
        expected = dense_from_parts(*parts, shape) if max(indptr, default=0) == len(data) else None
    except AssertionError:
        expected = None
    try:
        read = read_h5ad(path, backed=backed).load()
    except InputError as error:
        assert "\n" not in str(error)
        refusable = expected is None or not expected.any() or (backed and "must be canonical" in str(error))
        assert refusable, error
    else:
        assert expected is not None
        np.testing.assert_array_equal(read.counts.toarray(), expected[:, expected.sum(0) > 0])


NUMBERS = st.one_of(
    st.integers(0, 9).map(float),
    st.sampled_from([-1.0, 0.5, np.nan, np.inf, -np.inf, 2.0**24, 2.0**25, 1e300]),
)


@BOUNDED
@given(x=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=2, max_size=4), sparse=st.booleans())
def test_numbers_of_any_kind(x, sparse):
    dense = np.array(x)
    are_counts = np.isfinite(dense).all() and (dense >= 0).all() and (dense <= 2**24).all()
    are_counts = are_counts and (dense == np.rint(dense)).all()
    names = {"obs": {"_": range(len(x))}}
    adata = ad.AnnData(sp.csr_matrix(dense) if sparse else dense, **names)
    try:
        read = make_count_data(adata, where="adata", min_counts=0)
    except InputError:
        assert not are_counts
    else:
        assert are_counts
        np.testing.assert_array_equal(read.counts.toarray(), dense)


@settings(BOUNDED, max_examples=15)
@given(name=st.text(max_size=12))
def test_names_of_any_kind_keep_messages_on_one_line(tmp_path, name):
    """A file may call its gene anything; a message that speaks of it stays one line."""
    path = tmp_path / "counts.h5ad"
    write_h5ad(path)
    with h5py.File(path, "r+") as file:
        try:
            file["var/_index"][0] = name
        except UnicodeEncodeError:  # surrogates
            file["var/_index"][0] = b"\xff"
        file["X/data"][:] = 0.5
    with pytest.raises(InputError) as error:
        read_h5ad(path)
    assert len(str(error.value).splitlines()) == 1


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return self.mark.touch, ()


def test_nothing_pickled_is_executed(tmp_path):
    payload = np.void(pickle.dumps(Trap(tmp_path / "executed")))
    for number, element in enumerate(("uns/trap", "obsm/trap", "X", "layers/log", "obs/depth")):
        path = tmp_path / f"{number}.h5ad"
        write_h5ad(path)
        with h5py.File(path, "r+") as file:
            if element in file:
                del file[element]
            file[element] = payload
        try:
            read_h5ad(path)
        except InputError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / "executed").exists()


def test_links_in_circles_come_to_an_end(tmp_path):
    path = tmp_path / "counts.h5ad"
    write_h5ad(path)
    with h5py.File(path, "r+") as file:
        group = file["obsm"].create_group("circle")
        group.attrs["encoding-type"], group.attrs["encoding-version"] = "dict", "0.1.0"
        group["a"], group["b"] = h5py.SoftLink("/obsm/circle"), h5py.SoftLink("/obsm/circle")
        file["uns/all"] = h5py.SoftLink("/uns")
    with pytest.raises(InputError, match=r"obsm\['X_pca'\] holds .* must be a distribution"):
        read_h5ad(path, prior_key="X_pca")
    data = read_h5ad(path, subsample=5)
    data.source.copy_to(tmp_path / "copy.h5ad")
    with h5py.File(tmp_path / "copy.h5ad") as copy:
        assert list(copy["obsm"]) == ["X_pca"]


@pytest.mark.parametrize("target", ["/", "/obs", "/obs/depth"])
def test_a_column_that_is_a_link_to_what_it_is_in(target, tmp_path):
    """anndata would read the whole file a hundred times over, before its stack ends."""
    path = tmp_path / "counts.h5ad"
    write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["obs/depth"]
        file["obs/depth"] = h5py.SoftLink(target)
    with pytest.raises(InputError, match="/obs/depth is a link to what it is in") as error:
        read_h5ad(path)
    assert "\n" not in str(error.value)


def test_a_size_that_nothing_can_hold(tmp_path):
    path = tmp_path / "counts.h5ad"
    write_h5ad(path, np.asarray)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        file.create_dataset("X", shape=(2**30, 2**30), dtype="f4", chunks=(64, 64)).attrs.update(attributes)
    with pytest.raises(InputError, match="more than fits into memory") as error:
        read_h5ad(path)
    assert "\n" not in str(error.value)


def test_the_good_files_have_what_is_broken():
    assert counts().shape == (N_CELLS, N_GENES)
    assert (counts().sum(0) > 0).all()


def test_heaps_that_libhdf5_would_never_leave(tmp_path):
    """Zeros in place of a text, as a download leaves them that was cut short."""
    path = tmp_path / "counts.h5ad"
    write_h5ad(path)
    content = bytearray(path.read_bytes())
    heap = content.index(HEAP)
    content[heap + 16 : heap + 80] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(InputError, match="a heap of texts is damaged") as error:
        read_h5ad(path)
    assert "\n" not in str(error.value)
