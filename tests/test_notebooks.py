"""Every notebook runs from its first cell to its last, and its numbers bear out its text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="pip install 'nbmix[notebooks]'")
nbformat = pytest.importorskip("nbformat", reason="pip install 'nbmix[notebooks]'")
pytest.importorskip("ipykernel", reason="pip install 'nbmix[notebooks]'")

from tests.running import ROOT  # noqa: E402  after the skips

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
FACS = ROOT.parent / "shared" / "data" / "pbmc_facs.h5ad"
needs_sorted_cells = pytest.mark.skipif(not FACS.exists(), reason="needs ../shared/data/pbmc_facs.h5ad")


def execute(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, expression: str, facs: Path | None
) -> Any:
    """Run a notebook in ``folder``, and then ``expression``, whose value is returned by way of JSON."""
    shutil.copy(FOLDER / "common.py", folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    if facs is None:
        monkeypatch.delenv("NBMIX_PBMC_FACS", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # where nothing was downloaded
    else:
        monkeypatch.setenv("NBMIX_PBMC_FACS", str(facs))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))"))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return json.loads(notebook.cells[-1].outputs[-1].text.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_committed_without_outputs_and_paths(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    # an absolute path, in a string of any quotes
    assert not re.search(r"""["'`]/\w+/""", path.read_text())
    assert path.stat().st_size < 50_000


@pytest.mark.slow
def test_simulation(tmp_path, monkeypatch):
    found = execute("01_simulation", tmp_path, monkeypatch, "by_seed.to_dict()", None)
    assert min(found["default"].values()) == 1.0
    assert max(found["as printed"].values()) == 1.0


@pytest.mark.slow
@needs_sorted_cells
def test_two_populations(tmp_path, monkeypatch):
    expression = "[em.here.to_dict(), oracle_fit.here.to_dict(), by_start.loc['ari'].to_dict()]"
    em, oracle, by_start = execute("02_two_populations", tmp_path, monkeypatch, expression, FACS)
    assert em["default EM, cross entropy"] < 1e-6
    assert oracle["cross entropy of the oracle"] < 1e-6
    assert oracle["oracle, nats of a gene and label"] == pytest.approx(-41.151726, rel=0.02)
    assert by_start["EM on 256 cells"] > 0.95 > by_start["first batch"]


@pytest.mark.slow
@needs_sorted_cells
def test_four_populations(tmp_path, monkeypatch):
    expression = "[scores(default.responsibilities_), *(t.to_dict() for t in (joint, nmf, logistic))]"
    (*_, ari), joint, nmf, logistic = execute("03_four_populations", tmp_path, monkeypatch, expression, FACS)
    assert ari > 0.98
    assert joint["here"]["oracle"] == pytest.approx(joint["source"]["oracle"], rel=0.005)
    assert joint["here"]["oracle"] > joint["here"]["default EM"] > joint["here"]["EM as printed"]
    assert nmf["here"]["ARI"] < ari
    assert logistic["here"]["counts"] > 0.95 > logistic["here"]["size factor"]


@pytest.mark.slow
@needs_sorted_cells
def test_ten_populations(tmp_path, monkeypatch):
    expression = "[oracles.here.to_dict(), ari['EM']]"
    oracles, ari = execute("04_ten_populations", tmp_path, monkeypatch, expression, FACS)
    for kind in ("point mass", "Gamma"):
        assert oracles[f"{kind}, in-sample: accuracy"] > 0.99
        assert oracles[f"{kind}, cross-fitted: accuracy"] < 0.75
    assert ari > 0.55


@pytest.mark.slow
def test_single_gene(tmp_path, monkeypatch):
    expression = "[never_falls, gamma.trace[-1], clusters.trace[-1], trace[-1], -searched.fun]"
    never_falls, *maxima = execute("05_single_gene", tmp_path, monkeypatch, expression, None)
    assert never_falls
    assert maxima == pytest.approx([-262.8367378806] * 4, abs=1e-8)


@pytest.mark.slow
@needs_sorted_cells
def test_deep_relatives(tmp_path, monkeypatch):
    expression = "[table.loc['ari'].to_dict(), table.loc['held-out log likelihood'].to_dict()]"
    ari, held_out = execute("06_deep_relatives", tmp_path, monkeypatch, expression, FACS)
    assert min(ari.values()) > 0.9
    assert max(held_out, key=held_out.__getitem__) == "mixture"


@pytest.mark.slow
def test_simulated_cells_stand_in_where_there_are_no_sorted_ones(tmp_path, monkeypatch):
    expression = (
        "[cells.n_cells, names.tolist(), clustering_metrics(cells.labels, default.responsibilities_)['ari']]"
    )
    found = execute("02_two_populations", tmp_path, monkeypatch, expression, None)
    assert found == [512, ["b_cells", "cytotoxic_t"], 1.0]
