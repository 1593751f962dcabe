"""The command that puts all methods into one table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import anndata as ad
import pandas as pd
import pytest

from tests.helpers.running import ROOT, small_data


def baselines(*arguments):
    command = [sys.executable, "benchmarks/baselines.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def file(tmp_path):
    data = small_data(n_cells=90, n_components=2)
    path = tmp_path / "cells.h5ad"
    ad.AnnData(data.counts, obs=pd.DataFrame({"kind": data.labels}, index=data.cell_names)).write_h5ad(path)
    return path


@pytest.mark.slow
def test_methods_in_one_table(file, tmp_path):
    out = tmp_path / "out.json"
    methods = ("topics", "em-kmeans")
    done = baselines("--data", file, "--label-key", "kind", "--only", *methods, "--json", out)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert list(results) == list(methods)
    assert all(result["ari"] == result["accuracy"] == 1 for result in results.values())
    assert all(name in done.stdout for name in (*methods, "ARI", "NMI", "seconds", "CPU"))


@pytest.mark.slow
def test_a_file_without_the_labels(file):
    done = baselines("--data", file, "--only", "topics")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("obs has no column 'cell_type'; set --label-key")
