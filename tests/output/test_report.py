"""report.html: what is in it, that nothing in it is taken for markup, how its table works in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pkgutil import resolve_name

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from nbmix.evaluation.plots import DPI
from nbmix.evaluation.plots.interactive import bokeh_script, interactive_cells
from nbmix.output.pictures import section_of, title_and_caption
from nbmix.output.report import TOP_MARKERS, GroupLine, Picture, Report, flattened, shown
from tests.helpers.running import ROOT, TINY, run_here

HOSTILE = """</script><script>document.title='owned'</script>"'<img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CONFIGURED = OmegaConf.load(ROOT / "conf/config.yaml").evaluation.pictures
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


class Page(HTMLParser):
    """What a browser would make of a page: elements, attributes, text, and the rows of its tables."""

    VOID = frozenset({"meta", "img", "input", "link", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: dict[str | None, list[tuple[bool, list[str]]]] = {}
        self.within: dict[str | None, list[str]] = {}  # what an image stands in, by its name
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            around = ("section", "details", "figure")
            self.within[attributes["alt"]] = [tag for tag in self.open if tag in around]
        if tag == "table":
            self.rows = self.tables.setdefault(attributes.get("id"), [])
        elif tag == "tr":
            self.rows.append(("hidden" in attributes, []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes something else"

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data

    def visible(self, table: str) -> list[list[str]]:
        """Texts of the rows of a table that are seen, its head left out."""
        return [cells for hidden, cells in self.tables[table][1:] if not hidden]


def picture(title="Cells"):
    figure = Figure(figsize=(2, 1), dpi=DPI)
    figure.add_subplot().plot([0, 1])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Picture(title, "A caption.", buffer.getvalue())


def cells(names=("cell 0", "cell 1", "cell 2"), labels=None):
    """Three cells in a row, two of group 0 and one of group 2."""
    posterior = [[0.75, 0.0, 0.25], [1.0, 0.0, 0.0], [0.125, 0.0, 0.875]]
    drawn = interactive_cells("UMAP", [[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]], posterior, names, labels)
    return Picture("Cells, one by one", "Point at a cell.", drawn, "cells")


def markers(genes=("CD79A", "MS4A1", "LYZ", "S100A9")):
    n = len(genes)
    return pd.DataFrame(
        {
            "component": np.repeat([0, 1], n // 2),
            "rank": np.tile(np.arange(1, n // 2 + 1), 2),
            "gene": list(genes),
            "log2_fc_rest": [5.5, 4.0, 10.25, -3.0],
            "log2_fc_rest_se": [0.1, 0.2, 0.3, np.nan],
            "lfsr_rest": [0.0, 0.02, 1e-9, np.nan],
            "share": [1.0, 0.5, 0.25, 0.125],
            "nearest": [1, 1, 0, 0],
        }
    )


def report(**changes):
    content = {
        "metrics": {"n_cells": 12345, "log_likelihood": -1822.618, "ari": 0.98765, "converged": False},
        "groups": [
            GroupLine(0, 12000, 0.972, 0.99, ("B", 0.9), 1, ["CD79A", "MS4A1"]),
            GroupLine(3, 345, 0.028, 1.0, None, None, ["LYZ"]),
        ],
        "pictures": [picture()],
        "markers": markers(),
        "n_genes": 16791,
        "provenance": {"config": {"model": {"n_components": 2, "path": None}}, "versions": {"nbmix": "0.1"}},
    }
    return Report(**(content | changes))


def test_everything_is_there():
    page = Page(report().render())
    text = " ".join(page.texts)
    for words in ("12,345", "-1,822.62", "0.9877", "had not converged", "16,791 genes", "first 2 of"):
        assert words in text
    for setting in (
        ["config.model.n_components", "2"],
        ["config.model.path", "null"],
        ["versions.nbmix", "0.1"],
    ):
        assert [False, setting] in [list(row) for row in page.tables[None]]
    sections = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    links = {a["href"] for tag, a in page.elements if tag == "a"}
    assert links == {f"#{section}" for section in sections}
    first, second = page.tables[None][len(report().metrics) + 1 :][:2]
    assert first[1] == ["0", "12,000", "97.2%", "0.990", "B (90%)", "1", "CD79A, MS4A1"]
    assert second[1] == ["3", "345", "2.8%", "1.000", "", "", "LYZ"]
    rows = page.visible("markers")
    assert rows[0] == ["0", "1", "CD79A", "+5.50", "0.10", "< 0.0001", "100%", "1"]
    assert rows[3] == ["1", "2", "S100A9", "-3.00", "", "", "12%", "0"]


def test_cells_come_first_and_diagnostics_are_folded():
    sections = ("diagnostics", "groups", "markers", "cells")
    drawn = [picture(name)._replace(section=name) for name in sections]
    page = Page(report(pictures=[*drawn, cells()], n_shown=3).render())
    heads = [a["id"] for tag, a in page.elements if tag == "section"]
    assert heads == ["summary", "cells", "marker-genes", "groups", "diagnostics", "settings"]
    assert [a["href"] for tag, a in page.elements if tag == "a"] == [f"#{head}" for head in heads]
    images = [a["alt"] for tag, a in page.elements if tag == "img"]
    assert images == ["cells", "markers", "groups", "diagnostics"]
    assert page.within["diagnostics"] == ["section", "details", "figure"]
    assert page.within["cells"] == ["section", "figure"]
    assert all("open" not in a for tag, a in page.elements if tag == "details")
    assert "Shown are 3 of 12,345 cells, chosen at random." in page.texts
    chips = [a["data-group"] for tag, a in page.elements if "data-group" in a]
    assert chips == ["0", "2"]


def test_pages_without_cells_have_no_library():
    assert len(report().render()) < 100_000 < len(report(pictures=[cells()]).render())


def test_a_wide_picture_is_scrolled_on_a_telephone():
    (image,) = [a for tag, a in Page(report().render()).elements if tag == "img"]
    assert (image["width"], image["style"]) == ("160", "min-width: 120px")


def test_the_page_needs_nothing_from_elsewhere():
    html = report(pictures=[picture(), cells()]).render()
    page = Page(html)
    html = html.replace(bokeh_script(), "")  # its comments have links; a browser tells below what it loads
    assert not page.open
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"data:[^\"]*", "", html))
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
    (image,) = [attributes for tag, attributes in page.elements if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")
    assert image["width"] == "160"  # 2 inches
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0].startswith("default-src 'none'; img-src data:;")


def hostile_report():
    line = GroupLine(0, 5, 1.0, 1.0, (HOSTILE, 1.0), None, [HOSTILE])
    return report(
        metrics={"n_cells": 5, HOSTILE: HOSTILE},
        groups=[line],
        pictures=[picture(HOSTILE)._replace(caption=HOSTILE), cells([HOSTILE] * 3, [HOSTILE] * 3)],
        markers=markers((HOSTILE, "=1+1", "b", "c")),
        provenance={HOSTILE: {"data.path": HOSTILE, "empty": {}}},
    )


def test_names_and_settings_are_text_and_nothing_else():
    harmless = Page(report(pictures=[picture(), cells()]).render())
    hostile = Page(hostile_report().render())
    assert not hostile.open
    scripts = [sum(tag == "script" for tag, _ in page.elements) for page in (harmless, hostile)]
    assert scripts == [4, 4]  # data, library, cells, table
    allowed = {name for _, attributes in harmless.elements for name in attributes}
    assert {name for _, attributes in hostile.elements for name in attributes} <= allowed
    assert sum(HOSTILE in text for text in hostile.texts) >= 8  # each place, as it was typed
    assert hostile.visible("markers")[0][2] == HOSTILE


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        ("em", "em"),
        (94655, "94,655"),
        (-2323.4289, "-2,323.43"),
        (0.83190256, "0.8319"),
        (None, "None"),
    ],
)
def test_numbers_are_readable(value, text):
    assert shown(value) == text


def test_nested_settings_have_the_names_of_the_command_line():
    nested = {"model": {"m_step": {"lr": 0.01}}, "seed": 0, "ckpt_path": None, "callbacks": {}, "x": [1, 2]}
    assert list(flattened(nested)) == [
        ("model.m_step.lr", "0.01"),
        ("seed", "0"),
        ("ckpt_path", "null"),
        ("callbacks", "{}"),
        ("x", "[1, 2]"),
    ]


# what a user does to the page, and what the user then sees of the marker table
HANDS_AND_EYES = """
const set = (id, value) => {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event("input"));
};
const click = name => document.querySelector(`#markers th[data-name=${name}] button`).click();
const seen = () => [...document.querySelectorAll("#markers tbody tr")]
  .filter(row => row.offsetHeight > 0)
  .map(row => row.querySelector(".name").textContent);
"""


def in_chromium(html, folder, script):
    """What document.title is after the page has loaded and a test's own script has run at its end."""
    file = folder / "report.html"
    file.write_text(
        html.replace("</body>", f"<script>{HANDS_AND_EYES}{script}</script></body>"), encoding="utf-8"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += ["--enable-logging=stderr", "--window-size=1280,900", "--virtual-time-budget=10000"]
    command = [CHROMIUM, *options, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr  # an error of a script, or something that the page may not load
    return unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1])


@in_browser
def test_the_table_sorts_and_filters(tmp_path):
    steps = [  # one after the other on the same page
        ("", ["CD79A", "MS4A1", "LYZ", "S100A9"]),
        ("click('gene')", ["CD79A", "LYZ", "MS4A1", "S100A9"]),
        ("click('gene')", ["S100A9", "MS4A1", "LYZ", "CD79A"]),
        ("click('log2_fc_rest')", ["S100A9", "MS4A1", "CD79A", "LYZ"]),  # as numbers: 10.25 is more than 4
        ("click('lfsr_rest')", ["CD79A", "LYZ", "MS4A1", "S100A9"]),  # by all digits; unknown comes last
        ("set('by-component', '1')", ["LYZ", "S100A9"]),
        ("set('by-gene', 's10')", ["S100A9"]),
        ("set('by-component', '0')", []),
        ("set('by-component', '')", ["S100A9"]),
        ("set('by-gene', ''); set('by-rank', '1')", ["CD79A", "LYZ"]),
        ("click('component'); click('component')", ["LYZ", "CD79A"]),
        ("set('by-rank', '')", ["LYZ", "S100A9", "CD79A", "MS4A1"]),
    ]
    look = "looks.push([seen(), document.getElementById('n-shown').textContent]);"
    script = "".join(f"{action}; {look}\n" for action, _ in steps)
    title = in_chromium(
        report().render(), tmp_path, f"const looks = []; {script} document.title = JSON.stringify(looks);"
    )
    assert json.loads(title) == [[genes, f"{len(genes)} rows"] for _, genes in steps]


@in_browser
def test_the_report_of_a_run(tmp_path):
    run_here(tmp_path / "run", *TINY, "evaluation.max_umap_cells=0")
    script = """
        const images = [...document.images];
        const frame = document.getElementById("markers-scroll");
        document.title = JSON.stringify({
          cells: Bokeh.documents.length,
          broken: images.filter(image => !image.complete || image.naturalWidth === 0).length,
          pictures: images.map(image => image.alt),
          too_wide: frame.scrollWidth > frame.clientWidth || document.body.scrollWidth > window.innerWidth,
          rows: seen().length,
        });"""
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    looks = json.loads(in_chromium(html, tmp_path, after_drawing(script)))
    assert (looks["broken"], looks["too_wide"], looks["rows"]) == (0, False, 2 * TOP_MARKERS)
    assert looks["cells"] == 1
    draws = [resolve_name(name) for name in CONFIGURED]
    absent = {"Cells, one by one", "Number of components", "Batches and groups"}  # the first is no image
    assert looks["pictures"] == [
        title
        for section in ("cells", "markers", "groups", "diagnostics")
        for draw in draws
        if section_of(draw) == section and (title := title_and_caption(draw)[0]) not in absent
    ]


@in_browser
def test_a_gene_is_found_by_its_symbol(tmp_path):
    table = markers(("ENSG1", "ENSG2", "ENSG3", "ENSG4"))
    table.insert(3, "symbol", ["CD79A", "MS4A1", "LYZ", "S100A9"])
    script = """set('by-gene', 'cd79'); const one = seen(); set('by-gene', 'ensg4');
        document.title = JSON.stringify([one, seen()]);"""
    assert json.loads(in_chromium(report(markers=table).render(), tmp_path, script)) == [["ENSG1"], ["ENSG4"]]


# what a user does to the cells, and what the user then sees of them
CELLS = """
const drawn = () => new Promise(done => {
  document.querySelector(".plot").scrollIntoView();
  const look = () => document.querySelector(".plot").childElementCount
    && Bokeh.index.get_one(Bokeh.documents[0].roots()[0])?.is_idle ? done() : setTimeout(look, 20);
  look();
});
const place = name => {  // of a cell on the screen
  const page = Bokeh.documents[0];
  const view = Bokeh.index.get_one(page.roots()[0]);
  const { data } = page.get_model_by_name("cells");
  const i = data.cell.indexOf(name);
  const corner = view.canvas_view.el.getBoundingClientRect();
  return {
    clientX: corner.left + view.frame.x_scale.compute(data.x[i]),
    clientY: corner.top + view.frame.y_scale.compute(data.y[i]),
    view: window, isPrimary: true, bubbles: true, composed: true,
  };
};
const inside = root => [...root.querySelectorAll("*")].flatMap(
  element => [element, ...(element.shadowRoot ? inside(element.shadowRoot) : [])]);
const at = name => {  // the element under a cell
  const { clientX, clientY } = place(name);
  let found = document.elementFromPoint(clientX, clientY);
  while (found.shadowRoot) found = found.shadowRoot.elementFromPoint(clientX, clientY);
  return found;
};
const point = name => at(name).dispatchEvent(new PointerEvent("pointermove", place(name)));
const tap = name => {
  at(name).dispatchEvent(new PointerEvent("click", { ...place(name), pointerType: "touch" }));
};
const told = () => new Promise(done => setTimeout(() => done(
  inside(document).filter(e => e.classList.contains("bk-tooltip-content")).map(e => e.innerText)), 100));
const hide = group => document.querySelector(`[data-group="${group}"]`).click();
const shown = () => {
  const page = Bokeh.documents[0];
  const { cell } = page.get_model_by_name("cells").data;
  const seen = page.get_model_by_name("cells shown").booleans ?? cell.map(() => true);
  return cell.filter((_, i) => seen[i]).sort();
};
const pressed = () => [...document.querySelectorAll("[data-group]")].map(e => e.getAttribute("aria-pressed"));
"""


def after_drawing(steps):
    return f"{CELLS}(async () => {{ await drawn(); {steps} }})();"


@in_browser
def test_a_cell_tells_what_it_is_and_a_click_hides_its_group(tmp_path):
    look = "looks.push([shown(), pressed()]);"
    steps = [
        ("", ["cell 0", "cell 1", "cell 2"], ["true", "true"]),
        ("hide(0);", ["cell 2"], ["false", "true"]),
        ("hide(2);", [], ["false", "false"]),
        ("hide(0);", ["cell 0", "cell 1"], ["true", "false"]),
        ("document.querySelector('[data-all=true]').click();", ["cell 0", "cell 1", "cell 2"], ["true"] * 2),
        ("document.querySelector('[data-all=false]').click();", [], ["false"] * 2),
        ("hide(2); point('cell 0');", ["cell 2"], ["false", "true"]),
    ]
    script = "const looks = []; for (const touch of [point, tap]) for (const name of ['cell 2', 'cell 1'])"
    script += "{ touch(name); looks.push(await told()); }"
    script += "".join(f"{action} {look}" for action, _, _ in steps)
    script += "looks.push(await told()); document.title = JSON.stringify(looks);"
    html = report(pictures=[cells(labels=["T", "T", "B"])]).render()
    *looks, hidden = json.loads(in_chromium(html, tmp_path, after_drawing(script)))
    second = ["cell 1", "label T", "group 0, probability 1.0000", "second 2, probability 0.0000"]
    third = ["cell 2", "label B", "group 2, probability 0.8750", "second 0, probability 0.1250"]
    assert [text.split("\n") for (text,) in looks[:4]] == [third, second] * 2
    assert looks[4:] == [[names, buttons] for _, names, buttons in steps]
    assert hidden == []  # nothing is told of a cell that is not seen


@in_browser
def test_hostile_names_do_nothing_in_a_browser(tmp_path):
    script = """point(Bokeh.documents[0].get_model_by_name("cells").data.cell[0]); const cell = await told();
        click("gene"); document.title += " " + JSON.stringify([seen(), document.scripts.length, cell]);"""
    title = in_chromium(hostile_report().render(), tmp_path, after_drawing(script))
    name, _, content = title.partition(" [")
    assert name == "nbmix report"
    genes, n_scripts, (told,) = json.loads(f"[{content}")
    assert told.split("\n")[:2] == [HOSTILE, f"label {HOSTILE}"]
    assert sorted(genes) == sorted([HOSTILE, "=1+1", "b", "c"])
    assert n_scripts == 5  # its own, and this test's
