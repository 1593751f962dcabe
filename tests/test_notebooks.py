"""Every notebook runs from its first cell to its last, and its numbers bear out its text."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="pip install 'nbmix[notebooks]'")
nbformat = pytest.importorskip("nbformat", reason="pip install 'nbmix[notebooks]'")
jupyter_client = pytest.importorskip("jupyter_client", reason="pip install 'nbmix[notebooks]'")
pytest.importorskip("ipykernel", reason="pip install 'nbmix[notebooks]'")
jupyter_cache = pytest.importorskip("jupyter_cache", reason="pip install 'nbmix[docs]'")

from jupyter_cache.cache.main import CacheBundleIn  # noqa: E402  after the skips

from tests.helpers.running import ROOT  # noqa: E402  likewise

FOLDER = ROOT / "notebooks"
OF_THE_SITE = ROOT / "docs" / "_build" / ".jupyter_cache"  # see nb_execution_cache_path in docs/conf.py
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
FACS = ROOT.parent / "shared" / "data" / "pbmc_facs.h5ad"
needs_sorted_cells = pytest.mark.skipif(not FACS.exists(), reason="needs ../shared/data/pbmc_facs.h5ad")


class Kernel:
    """One process for all notebooks, which imports torch once; each begins empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython")}
        self.manager.start_kernel(cwd=str(folder), env=environment)

    def execute(self, name: str, expression: str, facs: Path | None, *, is_shown: bool = True) -> Any:
        """Run a notebook, and then ``expression``, whose value is returned by way of JSON.

        What is shown goes into the site's cache of outputs: the site does not run the notebook again.
        """
        if facs is None:  # nor anything that was downloaded
            changed = {"NBMIX_PBMC_FACS": "", "XDG_CACHE_HOME": str(self.folder / "cache")}
        else:
            changed = {"NBMIX_PBMC_FACS": str(facs)}
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        begin = f"%reset -f\nimport os\nos.environ.update({changed})\ndel os"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
        notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))"))
        client = nbclient.NotebookClient(notebook, km=self.manager, timeout=600)
        client.execute()
        client.kc.stop_channels()
        value = json.loads(notebook.cells[-1].outputs[-1].text.splitlines()[-1])
        if is_shown:
            notebook.cells = notebook.cells[1:-1]
            cache = jupyter_cache.get_cache(OF_THE_SITE)
            executed = CacheBundleIn(notebook, uri=f"{name}.ipynb")
            cache.cache_notebook_bundle(executed, check_validity=False, overwrite=True)
        return value


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copy(FOLDER / "common.py", folder)
    kernel = Kernel(folder)
    yield kernel
    kernel.manager.shutdown_kernel(now=True)


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
def test_simulation(kernel):
    expression = "[by_seed[name].dropna().tolist() for name in ('as printed', 'default')]"
    printed, default = kernel.execute("01_simulation", expression, None)
    assert min(printed) < max(printed) == 1.0
    assert min(default) == 1.0


@pytest.mark.slow
@needs_sorted_cells
def test_two_populations(kernel):
    expression = "[em.here.to_dict(), oracle_fit.here.to_dict(), by_start.loc['ari'].to_dict()]"
    em, oracle, by_start = kernel.execute("02_two_populations", expression, FACS)
    one_cell = 0.03  # that is placed wrongly for sure, of 512: 15 nats
    assert em["default EM, cross entropy"] < one_cell < 1 < em["EM as printed, cross entropy"]
    assert oracle["cross entropy of the oracle"] < 1e-6
    assert oracle["oracle, nats of a gene and label"] == pytest.approx(-41.151726, rel=0.02)
    assert by_start["EM on 256 cells"] > 0.95 > by_start["first batch"]


@pytest.mark.slow
@needs_sorted_cells
def test_four_populations(kernel):
    expression = "[scores(default.responsibilities_), *(t.to_dict() for t in (joint, nmf, logistic))]"
    (*_, ari), joint, nmf, logistic = kernel.execute("03_four_populations", expression, FACS)
    assert ari > 0.98
    assert joint["here"]["oracle"] == pytest.approx(joint["source"]["oracle"], rel=0.005)
    assert joint["here"]["oracle"] > joint["here"]["default EM"] > joint["here"]["EM as printed"]
    assert nmf["here"]["ARI"] < ari
    assert logistic["here"]["counts"] > 0.95 > logistic["here"]["size factor"]


@pytest.mark.slow
@needs_sorted_cells
def test_ten_populations(kernel):
    expression = "[oracles.here.to_dict(), ari['EM']]"
    oracles, ari = kernel.execute("04_ten_populations", expression, FACS)
    for kind in ("point mass", "Gamma"):
        assert oracles[f"{kind}, in-sample: accuracy"] > 0.99
        assert oracles[f"{kind}, cross-fitted: accuracy"] < 0.75
    assert ari > 0.55


@pytest.mark.slow
def test_single_gene(kernel):
    expression = "[never_falls, gamma.trace[-1], clusters.trace[-1], trace[-1], -searched.fun]"
    never_falls, *maxima = kernel.execute("05_single_gene", expression, None)
    assert never_falls
    assert maxima == pytest.approx([-262.8367378806] * 4, abs=1e-8)


@pytest.mark.slow
@needs_sorted_cells
def test_deep_relatives(kernel):
    expression = "[table.loc['ari'].to_dict(), table.loc['held-out log likelihood'].to_dict()]"
    ari, held_out = kernel.execute("06_deep_relatives", expression, FACS)
    assert min(ari.values()) > 0.9
    assert max(held_out, key=held_out.__getitem__) == "mixture"


@pytest.mark.slow
def test_simulated_cells_stand_in_where_there_are_no_sorted_ones(kernel):
    expression = (
        "[cells.n_cells, names.tolist(), clustering_metrics(cells.labels, default.responsibilities_)['ari']]"
    )
    found = kernel.execute("02_two_populations", expression, None, is_shown=False)
    assert found == [512, ["b_cells", "cytotoxic_t"], 1.0]
