"""The ten sorted PBMC populations of Zheng et al. (2017), Nat Commun 8:14049, from 10x Genomics."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import tarfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import anndata as ad
import numpy as np
import pandas as pd
import pooch
import requests
import scipy.sparse as sp
from filelock import FileLock

from nbmix.core.declared import Setting
from nbmix.data.counts import CountData
from nbmix.data.from_anndata import (
    DEFAULT_LABEL_KEY,
    DEFAULT_SYMBOL_KEY,
    LabelKey,
    Layer,
    MinCounts,
    PriorKey,
    SizeFactorKey,
    SymbolKey,
    make_count_data,
)
from nbmix.data.read import Subsample, pick_cells, read_h5ad
from nbmix.data.tenx import Library, parse_library
from nbmix.errors import InputError

ZHENG_URL = (
    "https://cf.10xgenomics.com/samples/cell-exp/1.1.0/{population}/"
    "{population}_filtered_gene_bc_matrices.tar.gz"
)
POPULATIONS = (
    "b_cells",
    "cd14_monocytes",
    "cd34",
    "cd4_t_helper",
    "regulatory_t",
    "naive_t",
    "memory_t",
    "cd56_nk",
    "cytotoxic_t",
    "naive_cytotoxic",
)
MIXTURES = {
    "mix2": ("cytotoxic_t", "b_cells"),
    "mix4": ("cytotoxic_t", "regulatory_t", "b_cells", "cd14_monocytes"),
    "mix10": POPULATIONS,
}
FOLDER = "filtered_matrices_mex/hg19"
CHECKSUMS = "checksums.json"
ATTEMPTS = 4
PIECE_BYTES = 2**16  # the most that a broken transfer loses
PAUSE_SECONDS = 1.0
TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, between two pieces

log = logging.getLogger(__name__)


def read_zheng(
    populations: Sequence[str] | str,
    *,
    path: str | os.PathLike[str] | None = None,
    cache_dir: Annotated[
        str | os.PathLike[str] | None,
        Setting("The folder for downloads. With null it is the user's cache folder."),
    ] = None,
    url: str = ZHENG_URL,
    label_key: LabelKey = DEFAULT_LABEL_KEY,
    layer: Layer = None,
    size_factor_key: SizeFactorKey = None,
    prior_key: PriorKey = None,
    gene_symbol_key: SymbolKey = DEFAULT_SYMBOL_KEY,
    min_counts: MinCounts = 1,
    subsample: Subsample = None,
    seed: int = 0,
) -> CountData:
    """Sorted populations as one data set, labelled by the sort.

    Each archive is fetched once, by one process at a time, into the cache. Its SHA-256 is recorded
    there when it is first used, and enforced from then on.

    Args:
        populations: names out of ``POPULATIONS``; for ``MIXTURES`` see the source notebook.
        path: an .h5ad file with these labels, read in place of the archives by ``read_h5ad``.
        url: address of an archive, with ``{population}`` where its name goes.
        label_key, layer, size_factor_key, prior_key, gene_symbol_key, min_counts, subsample, seed: as
            ``read_h5ad``.

    Returns:
        Cells ``population:barcode``, genes by Ensembl id, labels = populations.

    Raises:
        InputError: one line: an unknown population, no network, a damaged or changed archive.
    """
    if path is not None:
        return read_h5ad(
            path,
            label_key=label_key,
            layer=layer,
            size_factor_key=size_factor_key,
            prior_key=prior_key,
            gene_symbol_key=gene_symbol_key,
            min_counts=min_counts,
            populations=populations,
            subsample=subsample,
            seed=seed,
        )
    where, adata = _populations(populations, cache_dir, url)
    adata = pick_cells(
        adata, where=where, label_key=label_key, populations=None, subsample=subsample, seed=seed
    )
    return make_count_data(
        adata,
        where=where,
        label_key=label_key,
        layer=layer,
        size_factor_key=size_factor_key,
        prior_key=prior_key,
        gene_symbol_key=gene_symbol_key,
        min_counts=min_counts,
        annotate=True,
    )


def _populations(
    populations: Sequence[str] | str, cache_dir: str | os.PathLike[str] | None, url: str
) -> tuple[str, ad.AnnData]:
    """The cells of the archives of some populations, one population after the other; what they are called."""
    names = list(dict.fromkeys([populations] if isinstance(populations, str) else populations))
    if not names or not set(names) <= set(POPULATIONS):
        unknown = ", ".join(str(name) for name in names if name not in POPULATIONS) or "(empty)"
        raise InputError(f"data.populations: unknown {unknown}; name some of: {', '.join(POPULATIONS)}")
    cache = (
        Path(pooch.os_cache("nbmix") / "zheng" if cache_dir is None else cache_dir).expanduser().absolute()
    )
    where = f"data.cache_dir={cache}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            libraries = [_load(cache, url.replace("{population}", name)) for name in names]
    except OSError as error:
        raise InputError(
            f"{where}: cannot be used ({error}); set data.cache_dir to a folder of yours"
        ) from error
    for name, library in zip(names, libraries, strict=True):
        if not library.features.equals(libraries[0].features):
            raise InputError(
                f"{where}: {name} and {names[0]} list different genes; delete both and fetch again"
            )
    adata = ad.AnnData(
        sp.vstack([library.counts for library in libraries], format="csr"),
        obs=pd.DataFrame(
            {DEFAULT_LABEL_KEY: np.repeat(names, [len(library.barcodes) for library in libraries])},
            index=[
                f"{name}:{b}"
                for name, library in zip(names, libraries, strict=True)
                for b in library.barcodes
            ],
        ),
        var=libraries[0].features,
    )
    return where, adata


def _load(cache: Path, url: str) -> Library:
    """One archive, fetched unless it is there. What cannot be read is never recorded as good."""
    archive = cache / url.rsplit("/", 1)[-1]
    record = cache / CHECKSUMS
    try:
        checksums: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
        known = checksums.get(archive.name)
    except (ValueError, AttributeError):
        raise InputError(f"{record}: is not a JSON object of checksums; delete it") from None
    if not archive.exists():
        _fetch(url, archive, known)
    checksum = pooch.file_hash(str(archive), alg="sha256")
    if known is not None and checksum != known:
        raise InputError(
            f"{archive}: no longer matches its SHA-256 in {CHECKSUMS}; delete it to fetch it again"
        )
    library = _read_archive(archive)
    if known is None:
        _write_json(record, checksums | {archive.name: checksum})
    return library


def _fetch(url: str, archive: Path, known: str | None) -> None:
    """Download ``url`` to ``archive``; a broken transfer goes on where it stopped, also in a later run."""
    part = archive.with_name(archive.name + ".part")

    def download(url: str, output: str, _: object) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _resume(url, part)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                if attempt == ATTEMPTS:
                    raise
                log.info("%s: transfer broke off, attempt %d of %d", url, attempt + 1, ATTEMPTS)
                time.sleep(PAUSE_SECONDS * attempt)
        os.replace(part, output)

    log.info("downloading %s to %s", url, archive.parent)
    pooch.get_logger().setLevel("WARNING")  # it would recommend a hash for code that calls it
    try:
        pooch.retrieve(
            url,
            known_hash=None if known is None else f"sha256:{known}",
            fname=archive.name,
            path=archive.parent,
            downloader=download,
        )
    except requests.RequestException as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{url}: cannot be downloaded ({reason}); set data.path to an .h5ad with these labels, "
            f"or copy the archives to {archive.parent}"
        ) from error
    except ValueError as error:  # pooch, on another hash than the known one
        raise InputError(
            f"{url}: what it serves does not match the SHA-256 recorded in {archive.parent / CHECKSUMS}; "
            "delete that entry if the change is known to be right"
        ) from error


def _resume(url: str, part: Path) -> None:
    """Append to ``part`` what is missing of ``url`` (RFC 9110, section 14: range requests)."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()  # of another version, or complete but never moved: begin again
            raise requests.ConnectionError(f"nothing to resume at byte {start}")
        response.raise_for_status()
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        with part.open("ab" if response.status_code == requests.codes.partial and resumed else "wb") as file:
            for piece in response.iter_content(chunk_size=PIECE_BYTES):
                file.write(piece)


def _write_json(path: Path, content: dict[str, str]) -> None:
    """Replace ``path`` in one step: readers see the old content or the new, also after a crash."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_archive(archive: Path) -> Library:
    """Read the three members in memory; nothing is extracted to disk."""
    wanted = {f"{FOLDER}/{name}": name for name in ("matrix.mtx", "genes.tsv", "barcodes.tsv")}
    found: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream) as tar:
            for member in tar:  # in their order: a seek back would decompress all again
                if member.isfile() and (name := wanted.get(member.name.removeprefix("./"))):
                    found[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
            stream.read()  # to the end, where gzip compares its checksum
        if missing := sorted(set(wanted.values()) - set(found)):
            raise InputError(f"{archive}: misses {FOLDER}/{missing[0]}; delete it to fetch it again")
        matrix = found["matrix.mtx"]
        return parse_library(io.BytesIO(matrix), found["genes.tsv"], found["barcodes.tsv"], len(matrix))
    except InputError:
        raise
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{archive}: is damaged ({reason}); delete it to fetch it again") from error
