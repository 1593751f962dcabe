"""The site: make docs, or sphinx-build docs docs/_build/html"""

from __future__ import annotations

import logging
import os
import re
import sys
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path

import requests
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from jupyter_client.manager import AsyncKernelManager
from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "nbmix"
author = "the nbmix developers"
project_copyright = "the nbmix developers"
release = version = version_of("nbmix")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "**/*.py"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

# what has run once, here or in the tests, is taken from the cache
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of cells' `python`
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's; no bar is shown

# a kernel warns, on stderr, of connections that are not encrypted; notebooks' client has no file of settings
AsyncKernelManager.transport_encryption.default_value = "auto"

autosummary_generate = True
autodoc_member_order = "groupwise"
autodoc_typehints = "none"  # the signature has them
napoleon_use_rtype = False
templates_path = ["_templates"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "nbmix"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system says
html_static_path = ["_static", f"{find_spec('sphinx-mathjax-offline').submodule_search_locations[0]}/static"]
mathjax_path = "mathjax/tex-chtml.js"  # of that package, which as an extension would forbid several jobs
html_css_files = ["nbmix.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_persistent": [],
    "home_page_in_toc": False,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}

OTHERS = {
    "python": "https://docs.python.org/3/",
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "sklearn": "https://scikit-learn.org/stable/",
}


def _is_reached(url: str) -> bool:
    try:
        return requests.head(f"{url}objects.inv", timeout=3, allow_redirects=True).ok
    except requests.RequestException:
        return False


# without a network the site is built without links to other projects
intersphinx_mapping = {name: (url, None) for name, url in OTHERS.items() if _is_reached(url)}


def _literal_blocks(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Formulas and tables of a docstring, which are indented, become literal blocks."""
    found: list[str] = []
    is_literal = False
    for line in lines:
        is_indented = line.startswith("    ")
        if is_indented and len(found) > 1 and not found[-1] and re.match(r"\S", found[-2]):
            found += [".. code-block:: text", ""]
            is_literal = True
        elif line and not is_indented:
            is_literal = False
        found.append(line.replace("``", "") if is_literal else line)
    lines[:] = found


def _execute_side_by_side(app: Sphinx) -> None:
    """Run what is not in the cache on all cores; myst-nb would take one after the other."""
    if app.config.nb_execution_mode != "cache":
        return
    cache = get_cache(nb_execution_cache_path)
    for page in sorted({*HERE.glob("tutorials/*.md")} - {HERE / "tutorials" / "index.md"}):
        cache.add_nb_to_project(str(page), read_data={"name": "myst_nb_md", "type": "plugin"})
    for page in sorted(HERE.glob("notebooks/*.ipynb")):
        cache.add_nb_to_project(str(page))
    quiet = logging.getLogger("jupyter_cache")
    quiet.setLevel(logging.WARNING)  # without a level it would also tell when processes end
    load_executor("local-parallel", cache, logger=quiet).run_and_cache(timeout=nb_execution_timeout)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", _execute_side_by_side)
    app.connect("autodoc-process-docstring", _literal_blocks, priority=100)  # before napoleon's
