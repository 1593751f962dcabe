"""What the documents say is so: settings are there, Python runs, links lead somewhere, examples hold."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import nbmix
from tests.helpers.files import write_tenx_folder
from tests.helpers.pages import EXTEND, blocks
from tests.helpers.running import ROOT

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("[a-z]*/*.md")),
]
OF_USE = [page for page in PAGES if page != EXTEND]  # whose commands and Python need no files of one's own


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


LAUNCHERS = ("joblib", "submitit_slurm")  # extras, which need not be installed
SIMULATION = nbmix.simulate(n=60, p=40, k=5, s=2e3, seed=1)  # a group of four can be split in two


def commands() -> list[str]:
    """Arguments of every ``train.py`` in the documents, those in tables and sentences too."""
    found = []
    for page in OF_USE:
        lines = [line.split(" #")[0] for block in blocks(page, "sh") for line in block.splitlines()]
        lines += [line for line in re.findall(r"`([^`\n]+)`", page.read_text()) if line.startswith("python ")]
        for line in lines:
            _, called, arguments = line.partition("train.py")
            if called and "..." not in arguments:
                found.append(arguments.strip())
    return sorted(set(found))


@functools.cache
def make_settings():
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs" / "make_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_commands():
    assert len(commands()) > 20
    assert any("trainer.num_nodes" in arguments for arguments in commands())


@functools.cache
def keys_and_choices() -> tuple[set[str], set[str]]:
    """All keys of conf/, and all choices as they are typed: start=random, sweep=optuna."""
    settings = make_settings()
    every = [settings.read_choice(ROOT / "conf" / "config.yaml")]
    chosen = set()
    for group, (selector, _) in settings.GROUPS.items():
        for name, choice in settings.choices(group).items():
            every.append(choice)
            chosen.add(f"{selector}{name}")
    return {key.name for choice in every for key in choice.keys}, chosen


@pytest.mark.parametrize("arguments", commands())
def test_settings_in_a_command_are_there(arguments):
    keys, chosen = keys_and_choices()
    words = [word for word in shlex.split(arguments) if not word.startswith("-")]
    for override in OverridesParser.create().parse_overrides(words):  # raises where quotes are missing
        key = override.key_or_group
        if key == "hydra/launcher":
            assert override.value() in LAUNCHERS
        elif not key.startswith("hydra.launcher."):
            assert key in keys or override.input_line in chosen, override.input_line


@pytest.mark.parametrize("file", make_settings().files(), ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_conf_says_what_the_package_declares(file):
    assert file.read_text() == make_settings().filled(file), "settings have changed: make settings"


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("n_init: 10", "n_inits: 10", "n_inits is not declared"),
        ("n_init: 10", "# n_init: 10", "has no line for n_init"),
    ],
)
def test_a_line_and_a_setting_belong_together(old, new, words, tmp_path):
    file = tmp_path / "kmeans.yaml"
    file.write_text((ROOT / "conf" / "start" / "kmeans.yaml").read_text().replace(old, new))
    with pytest.raises(ValueError, match=words):
        make_settings().filled(file)


def test_a_default_and_a_comment_are_mended(tmp_path):
    text = (ROOT / "conf" / "start" / "kmeans.yaml").read_text()
    file = tmp_path / "kmeans.yaml"
    file.write_text(re.sub(r"n_pcs: 20 # .*", "n_pcs: 21", text))
    assert make_settings().filled(file) == text


def test_pages_of_settings_are_those_of_conf():
    assert (ROOT / "docs" / "settings.md").read_text() == make_settings().page(), (
        "conf/ has changed: make settings"
    )


def leaves(content, prefix=""):
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        elif name not in ("_target_", "defaults"):
            yield f"{prefix}{name}"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf").glob("*/*.yaml")), ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_every_key_is_there_and_has_a_meaning(file):
    settings = make_settings()
    choice = settings.read_choice(file)
    content = OmegaConf.to_container(OmegaConf.load(file))
    names = [key.name for key in choice.keys]
    prefix = (
        ""
        if "@package _global_" in file.read_text()
        else settings.PREFIX.get(file.parent.name, file.parent.name) + "."
    )
    assert sorted(names) == sorted(leaves({k: v for k, v in content.items() if k != "defaults"}, prefix))
    assert choice.meaning or file.parent.name in ("trainer", "data")
    if file.parent.name != "experiment" and file.stem not in ("mix2", "mix4", "mix10"):
        assert [key.name for key in choice.keys if not key.meaning] == []


def test_the_settings_of_every_run_have_a_meaning():
    keys = make_settings().read_choice(ROOT / "conf" / "config.yaml").keys
    assert {"task", "seed", "ckpt_path", "hydra.run.dir"} <= {key.name for key in keys}
    assert [key.name for key in keys if not key.meaning] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    def anchors(text):
        return {
            re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-")
            for head in re.findall(r"^#+ (.*)$", text, re.M)
        }

    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text()), target


@pytest.mark.parametrize("page", [p for p in OF_USE if blocks(p, "python")], ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    """On counts so small that any fit is fast, in a folder with the files that it names."""
    monkeypatch.chdir(tmp_path)
    write_tenx_folder(tmp_path / "filtered_feature_bc_matrix", x=SIMULATION.counts.astype(int))
    cells = nbmix.read_10x("filtered_feature_bc_matrix")
    cells.obs["nbmix"] = SIMULATION.labels.astype(str)
    (tmp_path / "outputs/DATE/TIME").mkdir(parents=True)
    cells.write_h5ad("outputs/DATE/TIME/result.h5ad")
    names = {"adata": cells, "counts": SIMULATION.counts, "new_counts": SIMULATION.counts}
    names |= {"new": cells.copy(), "new_adata": cells.copy()}
    names |= {"parts": [SIMULATION.counts] * 2, "more": SIMULATION.counts}
    fitted = nbmix.NBMixture(2, start="kmeans", components_per_group=1).fit(cells)
    fitted.save("outputs/DATE/TIME/checkpoints/last.ckpt")
    for block in blocks(page, "python"):
        ast.parse(block)
        exec(compile(block, f"{page.name}", "exec"), names)
    assert "nbmix" in names["adata"].obs


def test_the_citation_is_of_this_version():
    citation = OmegaConf.to_container(OmegaConf.load(ROOT / "CITATION.cff"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"message", "title", "authors"} < citation.keys()
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"] + [ROOT / "benchmarks" / "RESULTS.md"]


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_files_and_names_of_the_project_are_there(page):
    text = page.read_text()
    paths = set(re.findall(r"(?<![\w/.-])(?:nbmix|tests|benchmarks|conf)/[\w./-]*", text))
    assert [path for path in sorted(paths) if not (ROOT / path.rstrip(".")).exists()] == []
    for name in set(re.findall(r"(?<![\w/.])(?:nbmix|tests|benchmarks)(?:\.[A-Za-z]\w*)+", text)):
        pkgutil.resolve_name(name)  # raises where there is none


MODULES = sorted(m.name for m in pkgutil.walk_packages(nbmix.__path__, "nbmix."))


def test_docstrings_tell_the_truth():
    results = [doctest.testmod(importlib.import_module(name)) for name in MODULES]
    assert sum(result.attempted for result in results) > 60
    assert sum(result.failed for result in results) == 0


def is_own(function) -> bool:
    """Whether it is written in ``nbmix.supervised``, and not imported there."""
    return function.__module__ == nbmix.supervised.__name__


def exported():
    functions = [getattr(nbmix, name) for name in nbmix.__all__ if name != "__version__"]
    functions += [
        f for _, f in inspect.getmembers(nbmix.NBMixture, inspect.isfunction) if "nbmix" in f.__module__
    ]
    functions += [getattr(nbmix.em, name) for name in nbmix.em.__all__ if name.startswith("fit")]
    functions += [f for _, f in inspect.getmembers(nbmix.supervised, inspect.isfunction) if is_own(f)]
    return [f for f in functions if not inspect.ismodule(f) and not f.__name__.startswith("_")]


@pytest.mark.parametrize("name, most", [("README.md", 120), ("benchmarks/RESULTS.md", 150)])
def test_what_is_read_first_stays_short(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "api" / "index.md").read_text()
    listed = {line.strip() for line in page.splitlines()}
    names = {f.__qualname__ for f in exported() if "." not in f.__qualname__}
    assert {name for name in names if not any(line.split(".")[-1] == name for line in listed)} == set()


@pytest.mark.parametrize("function", exported(), ids=lambda f: f.__qualname__)
def test_there_is_an_example_in_every_public_docstring(function):
    assert doctest.DocTestFinder(recurse=False).find(function)[0].examples
