from __future__ import annotations

import gzip
import io
import json
import socket
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from nbmix.data import zheng
from nbmix.data.zheng import CHECKSUMS, FOLDER, MIXTURES, PIECE_BYTES, POPULATIONS, ZHENG_URL, read_zheng
from nbmix.errors import InputError

GENES = ("ENSG1\tMS4A1", "ENSG2\tCD3E", "ENSG3\tSILENT")
COUNTS = {
    "b_cells": np.array([[3, 0, 0], [1, 1, 0]]),
    "cytotoxic_t": np.array([[0, 2, 0], [1, 4, 0], [0, 0, 0]]),
}
LARGE = {
    "other/file": np.random.default_rng(0).bytes(5 * PIECE_BYTES)
}  # so that an archive takes many pieces


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def members(counts: np.ndarray, genes: tuple[str, ...] = GENES) -> dict[str, bytes]:
    matrix = io.BytesIO()
    scipy.io.mmwrite(matrix, sp.coo_matrix(counts.T), field="integer")
    return {
        f"{FOLDER}/genes.tsv": "\n".join(genes).encode(),
        f"{FOLDER}/barcodes.tsv": "".join(f"ACGT-{i}\n" for i in range(len(counts))).encode(),
        f"{FOLDER}/matrix.mtx": matrix.getvalue(),
    }


def pack(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    # no time stamps, so that the same members give the same bytes
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


class Server(ThreadingHTTPServer):
    """Serves ``files`` with ranges; cuts the first ``cuts`` answers half-way."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cuts = 0
        self.ranges = True
        self.requested: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/{{population}}.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        content = self.server.files.get(self.path.removeprefix("/").removesuffix(".tar.gz"))
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(zheng, "PAUSE_SECONDS", 0.0)
    with Server({name: pack(members(counts) | LARGE) for name, counts in COUNTS.items()}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_names_and_addresses():
    assert len(set(POPULATIONS)) == 10
    assert all(set(names) <= set(POPULATIONS) for names in MIXTURES.values())
    assert ZHENG_URL.replace("{population}", "cd34") == (
        "https://cf.10xgenomics.com/samples/cell-exp/1.1.0/cd34/cd34_filtered_gene_bc_matrices.tar.gz"
    )


def test_populations_are_joined_and_fetched_once(server, tmp_path):
    for _ in range(2):
        data = read_zheng(MIXTURES["mix2"], cache_dir=tmp_path / "cache", url=server.url)
        np.testing.assert_array_equal(data.counts.toarray(), [[0, 2], [1, 4], [0, 0], [3, 0], [1, 1]])
        assert data.labels.tolist() == ["cytotoxic_t"] * 3 + ["b_cells"] * 2
        assert data.cell_names[[0, 3]].tolist() == ["cytotoxic_t:ACGT-0", "b_cells:ACGT-0"]
        assert data.gene_names.tolist() == ["ENSG1", "ENSG2"]
        assert data.size_factors.tolist() == [2, 5, 0, 3, 2]
    assert server.requested == [None, None]
    assert set(json.loads((tmp_path / "cache" / CHECKSUMS).read_text())) == {
        "b_cells.tar.gz",
        "cytotoxic_t.tar.gz",
    }
    kept = {path.name for path in (tmp_path / "cache").iterdir()} - {".lock"}
    assert kept == {"b_cells.tar.gz", "cytotoxic_t.tar.gz", CHECKSUMS}
    assert read_zheng("b_cells", cache_dir=tmp_path / "cache", url=server.url, subsample=1).n_cells == 1


def test_a_broken_transfer_is_resumed(server, tmp_path):
    server.cuts = 1
    assert read_zheng("b_cells", cache_dir=tmp_path, url=server.url).n_cells == 2
    first, second = server.requested
    assert first is None
    kept = int(second.removeprefix("bytes=").removesuffix("-"))
    half = len(server.files["b_cells"]) // 2
    assert 0 < half - PIECE_BYTES < kept <= half


def test_a_server_without_ranges_is_asked_again(server, tmp_path):
    server.cuts, server.ranges = 1, False
    assert read_zheng("b_cells", cache_dir=tmp_path, url=server.url).n_cells == 2


def test_what_an_earlier_run_left_is_resumed(server, tmp_path):
    server.cuts = zheng.ATTEMPTS
    with pytest.raises(
        InputError, match=r"b_cells\.tar\.gz: cannot be downloaded \(.*\); set data\.path to an"
    ):
        read_zheng("b_cells", cache_dir=tmp_path, url=server.url)
    assert read_zheng("b_cells", cache_dir=tmp_path, url=server.url).n_cells == 2
    assert server.requested[-1] is not None


def test_a_partial_file_longer_than_the_archive_is_dropped(server, tmp_path):
    (tmp_path / "b_cells.tar.gz.part").write_bytes(b"x" * 10**6)
    assert read_zheng("b_cells", cache_dir=tmp_path, url=server.url).n_cells == 2


def test_two_processes_at_once_fetch_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(read_zheng, "b_cells", cache_dir=tmp_path, url=server.url) for _ in range(4)]
    assert [run.result().n_cells for run in runs] == [2] * 4
    assert server.requested == [None]


def test_a_changed_file_is_refused(server, tmp_path):
    read_zheng("b_cells", cache_dir=tmp_path, url=server.url)
    (tmp_path / "b_cells.tar.gz").write_bytes(server.files["cytotoxic_t"])
    with pytest.raises(InputError) as error:
        read_zheng("b_cells", cache_dir=tmp_path, url=server.url)
    archive = tmp_path / "b_cells.tar.gz"
    assert one_line(error) == (
        f"{archive}: no longer matches its SHA-256 in checksums.json; delete it to fetch it again"
    )


def test_a_changed_download_is_refused(server, tmp_path):
    read_zheng("b_cells", cache_dir=tmp_path, url=server.url)
    (tmp_path / "b_cells.tar.gz").unlink()
    server.files["b_cells"] = server.files["cytotoxic_t"]
    with pytest.raises(InputError) as error:
        read_zheng("b_cells", cache_dir=tmp_path, url=server.url)
    assert "what it serves does not match the SHA-256 recorded in" in one_line(error)
    assert not (tmp_path / "b_cells.tar.gz").exists()


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(zheng, "PAUSE_SECONDS", 0.0)
    with socket.socket() as closed:  # bound but not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/{{population}}.tar.gz"
        with pytest.raises(InputError) as error:
            read_zheng("b_cells", cache_dir=tmp_path, url=url)
    message = one_line(error)
    assert message.startswith(url.replace("{population}", "b_cells") + ": cannot be downloaded (")
    assert message.endswith(
        f"set data.path to an .h5ad with these labels, or copy the archives to {tmp_path}"
    )


def test_missing_on_the_server(server, tmp_path):
    with pytest.raises(InputError, match=r"cannot be downloaded \(404 Client Error") as error:
        read_zheng("cd34", cache_dir=tmp_path, url=server.url)
    one_line(error)
    assert len(server.requested) == 1


def without(name: str) -> bytes:
    return pack(
        {path: content for path, content in members(COUNTS["b_cells"]).items() if not path.endswith(name)}
    )


def swapped_crc() -> bytes:
    good = pack(members(COUNTS["b_cells"]))
    return good[:-8] + bytes(byte ^ 255 for byte in good[-8:-4]) + good[-4:]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<html>Not Found</html>", "is damaged ("),
        (pack(members(COUNTS["b_cells"]))[:150], "is damaged ("),
        (swapped_crc(), "is damaged (CRC check failed"),
        (gzip.compress(b"no tar", mtime=0), "is damaged ("),
        (without("genes.tsv"), f"misses {FOLDER}/genes.tsv"),
        (pack(members(COUNTS["b_cells"]) | {f"{FOLDER}/matrix.mtx": b"hello"}), "is damaged ("),
        (
            pack(members(COUNTS["b_cells"]) | {f"{FOLDER}/genes.tsv": b"ENSG1\tA\n"}),
            "is damaged (a matrix of (2, 3)",
        ),
        (pack(members(COUNTS["b_cells"]) | {f"{FOLDER}/genes.tsv": b"A\nB\n\nC\n"}), "is damaged ("),
    ],
)
def test_a_damaged_archive_is_never_recorded(server, tmp_path, content, what):
    good, server.files["b_cells"] = server.files["b_cells"], content
    with pytest.raises(InputError) as error:
        read_zheng("b_cells", cache_dir=tmp_path, url=server.url)
    message = one_line(error)
    assert message.startswith(f"{tmp_path / 'b_cells.tar.gz'}: {what}")
    assert message.endswith("; delete it to fetch it again")
    (tmp_path / "b_cells.tar.gz").unlink()
    server.files["b_cells"] = good
    assert read_zheng("b_cells", cache_dir=tmp_path, url=server.url).n_cells == 2


def test_members_outside_the_folder_are_not_extracted(tmp_path):
    (tmp_path / "cache").mkdir()
    archive = {"../escaped.txt": b"x"} | {f"./{name}": c for name, c in members(COUNTS["b_cells"]).items()}
    (tmp_path / "cache" / "b_cells.tar.gz").write_bytes(pack(archive))
    assert (
        read_zheng(
            "b_cells", cache_dir=tmp_path / "cache", url="http://127.0.0.1:1/{population}.tar.gz"
        ).n_cells
        == 2
    )
    assert not (tmp_path / "escaped.txt").exists()


def test_archives_with_different_genes(server, tmp_path):
    server.files["b_cells"] = pack(members(COUNTS["b_cells"], ("ENSG9\tX", *GENES[1:])))
    with pytest.raises(InputError, match="b_cells and cytotoxic_t list different genes") as error:
        read_zheng(MIXTURES["mix2"], cache_dir=tmp_path, url=server.url)
    one_line(error)


@pytest.mark.parametrize(
    ("populations", "what"),
    [(["b_cells", "mix4"], "unknown mix4; name some of: b_cells, cd14"), ([], "unknown (empty)")],
)
def test_unknown_populations(tmp_path, populations, what):
    with pytest.raises(InputError) as error:
        read_zheng(populations, cache_dir=tmp_path)
    assert what in one_line(error)


def test_unusable_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"data\.cache_dir=.*: cannot be used .*; set data\.cache_dir"
    ) as error:
        read_zheng("b_cells", cache_dir=tmp_path / "file" / "cache")
    one_line(error)
    (tmp_path / CHECKSUMS).write_text("[]")
    with pytest.raises(InputError, match=r"checksums\.json: is not a JSON object of checksums; delete it"):
        read_zheng("b_cells", cache_dir=tmp_path)


def test_a_file_in_place_of_the_archives(tmp_path):
    adata = ad.AnnData(
        sp.csr_matrix(np.vstack([COUNTS["b_cells"], COUNTS["cytotoxic_t"]])),
        obs=pd.DataFrame({"cell_type": ["b_cells"] * 2 + ["cytotoxic_t"] * 3}, index=list("abcde")),
        var=pd.DataFrame(index=["ENSG1", "ENSG2", "ENSG3"]),
    )
    path: Path = tmp_path / "sorted.h5ad"
    adata.write_h5ad(path)
    assert read_zheng(MIXTURES["mix2"], path=path).counts.shape == (5, 2)
    with pytest.raises(InputError, match="no cell has obs\\['cell_type'\\] = cd14_monocytes, regulatory_t"):
        read_zheng(MIXTURES["mix4"], path=path)
