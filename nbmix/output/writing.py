"""The run folder: result.h5ad, tables as .csv, figures, report.html and metrics.json."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

from nbmix.core.memory import give_back
from nbmix.data.source import LIGHT, SourceFile
from nbmix.data.whole_file import whole_file, why_unwritable
from nbmix.errors import in_one_line
from nbmix.evaluation.plots.interactive import InteractiveCells
from nbmix.evaluation.plots.style import DPI
from nbmix.output.annotate import add_aliases, annotate_file, fields_of
from nbmix.output.batches import batch_lines, batches_table
from nbmix.output.groups import how_many, joins_table
from nbmix.output.pictures import Draw, section_of, title_and_caption
from nbmix.output.report import TOP_MARKERS, Picture, Report, group_lines
from nbmix.output.results import Results, named_markers
from nbmix.progress import say

log = logging.getLogger(__name__)

DRAWING = "drawing"  # a phase

RGBA = 4  # colours of a pixel, as TensorBoard numbers them

ROWS_AT_ONCE = 10_000  # of a table, as Python's numbers and texts


def write_outcome(
    results: Results,
    metrics: dict[str, Any],
    folder: Path,
    loggers: Sequence[Logger] = (),
    pictures: Sequence[Draw] = (),
) -> None:
    """All files of the run folder that a result makes.

    Args:
        results: what they are of.
        metrics: of ``nbmix.output.scores.score``, and what else belongs into metrics.json.
        folder: the run folder.
        loggers: figures are handed to them, too.
        pictures: in the order of the report.
    """
    for name in ("n_components.csv", "joins.csv", "separations.csv", "batches.csv"):  # of an earlier fit
        (folder / name).unlink(missing_ok=True)
    if results.choice is not None:
        with sparing(folder / "n_components.csv"):
            results.choice.table().to_csv(folder / "n_components.csv", index=False, float_format="%.8g")
    if results.joins is not None:
        with sparing(folder / "joins.csv") as file, whole_file(file) as part:
            joins_table(results.joins).to_csv(part, index=False, float_format="%.5g")
    if results.separations is not None and len(results.separations):
        with (
            sparing(folder / "separations.csv"),
            whole_file(folder / "separations.csv") as part,
        ):
            results.separations.to_csv(part, index=False, float_format="%.5g")
    of_batches = batches_table(results)
    if of_batches is not None:
        with whole_file(folder / "batches.csv") as part:
            of_batches.to_csv(part)
    write_result(results, folder / "result.h5ad", embed=bool(pictures))  # they are drawn on it
    give_back()
    table = pd.DataFrame({"component": [], "rank": [], "gene": []})
    with sparing(folder / "markers.csv"):
        table = named_markers(results)
        give_back()
        write_markers(table, folder / "markers.csv")
    shown = write_pictures(results, pictures, folder / "figures", loggers)
    say("writing the report")
    with sparing(folder / "report.html"):
        write_report(results, metrics, table, shown, folder / "report.html")
    write_json(folder / "metrics.json", metrics)  # the last: where it is, all is there


@contextmanager
def sparing(file: Path, what: str | None = None, *, keep: bool = False) -> Iterator[Path]:
    """Make a warning of what fails: one table or picture must not cost the rest of a fit.

    A file of that name is then of an earlier fit, and goes, unless ``keep``. A disk that is full, or a folder
    that cannot be written to, is no such failure.
    """
    try:
        yield file
    except Exception as error:
        if why_unwritable(error) is not None:
            raise
        if not keep:
            file.unlink(missing_ok=True)
        log.warning("%s is left out: %s", what or file.name, in_one_line(error))


def write_result(results: Results, path: Path, *, embed: bool = False) -> None:
    """result.h5ad: the file that the cells were read from, with what ``annotate`` says of them.

    Of cells that come from elsewhere, or from a file that has changed since, counts that are in memory, obs
    and var are written, and known labels as obs["cell_type"] where there is no such column.

    Args:
        results: what it is of.
        path: of the file.
        embed: write the embedding, too.
    """
    data = results.data.data
    source = data.source
    with whole_file(path) as part:
        if source is not None:
            try:
                _write_beside_theirs(results, source, part, embed)
                return
            except Exception as error:  # a fit must not be lost to what else a file holds
                if why_unwritable(error) is not None:
                    raise
                reason = in_one_line(error)
                log.warning("%s: goes without what else %s holds (%s)", path.name, source.path, reason)
        own = _own_result(results, embed)
        try:
            _write_h5ad(own if data.annotations is None else _merged(own, data.annotations), part)
        except Exception as error:
            if data.annotations is None or why_unwritable(error) is not None:
                raise
            log.warning("%s: goes without some of the input's fields (%s)", path, in_one_line(error))
            _write_h5ad(_merged(own, _writable(data.annotations)), part)


def _write_beside_theirs(results: Results, source: SourceFile, part: Path, embed: bool) -> None:
    if not source.is_unchanged:
        raise RuntimeError("the file has changed since it was read")
    say("copying the file")
    source.copy_to(part)
    with h5py.File(part, "r+") as file:
        annotate_file(file, "nbmix", results, embed=embed)


def _own_result(results: Results, embed: bool) -> ad.AnnData:
    """Counts that are in memory, what nbmix says of cells and genes, and known labels."""
    data = results.data.data
    own = fields_of(results, "nbmix", data.gene_names, np.arange(data.n_genes), embed=embed)
    own.obs_names, own.var_names = data.cell_names, data.gene_names
    add_aliases(own.obsm, own.uns, "nbmix")
    own.X = None if data.is_backed else data.counts
    if data.labels is not None:
        names, codes = np.unique(data.labels, return_inverse=True)
        own.obs["cell_type"] = pd.Categorical.from_codes(codes, names)
    return own


def _writable(given: ad.AnnData) -> ad.AnnData:
    """Those columns that anndata can write."""
    with h5py.File("trial", "w", driver="core", backing_store=False) as file:

        def can_write(table: pd.DataFrame) -> bool:
            try:
                write_elem(file, "trial", table)
            except Exception:  # h5py and anndata raise all kinds
                return False
            return True

        obs, var = (table[[c for c in table if can_write(table[[c]])]] for table in (given.obs, given.var))
    return ad.AnnData(obs=obs, var=var)


def _merged(own: ad.AnnData, given: ad.AnnData) -> ad.AnnData:
    """What nbmix says of cells and genes, and what the input says where it does not collide."""
    theirs = ["cell_type"] if "cell_type" in given.obs and "cell_type" in own.obs else []
    obs = given.obs.set_axis(own.obs_names)
    return ad.AnnData(
        own.X,
        obs=obs.assign(**own.obs.drop(columns=theirs)),
        var=given.var.set_axis(own.var_names),
        obsm=dict(own.obsm),
        varm=dict(own.varm),
        uns=dict(own.uns),
    )


def _write_h5ad(adata: ad.AnnData, path: Path) -> None:
    say("writing result.h5ad")
    logging.getLogger("anndata").setLevel(logging.WARNING)  # it would name every column of strings
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path, **LIGHT)


def write_markers(table: pd.DataFrame, path: Path) -> None:
    """markers.csv: every component and gene, see ``marker_table``; five significant digits.

    pandas would format a number in three times the time.
    """
    with whole_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=os.linesep)
        writer.writerow(table.columns)
        for first in range(0, len(table), ROWS_AT_ONCE):
            rows = table[first : first + ROWS_AT_ONCE]
            writer.writerows(zip(*(_as_texts(rows[name]) for name in rows), strict=True))


def _as_texts(column: pd.Series) -> list[Any]:
    """Floating-point numbers with five significant digits, nothing where one is missing."""
    values = column.tolist()
    if column.dtype.kind != "f":
        return values
    return ["" if math.isnan(value) else f"{value:.5g}" for value in values]


def write_report(
    results: Results, metrics: Mapping[str, Any], table: pd.DataFrame, pictures: Sequence[Picture], path: Path
) -> None:
    """report.html, from what the other functions made: ``table`` of markers, and ``pictures``."""
    top = table[table["rank"] <= TOP_MARKERS].copy()
    top["log2_fc_rest_se"] = top["ln_fc_rest_se"] / np.log(2)
    lines = group_lines(results, table)
    n_genes, made_by = results.data.data.n_genes, results.provenance
    number = "" if results.joins is None else how_many(results.joins, len(results.groups))
    of_batches = batch_lines(results)
    for line in of_batches:
        log.warning("%s", line)
    n_shown = results.shown_rows.size
    page = Report(metrics, lines, pictures, top, n_genes, made_by, number, of_batches, n_shown).render()
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8")


def write_pictures(
    results: Results, pictures: Sequence[Draw], folder: Path, loggers: Sequence[Logger] = ()
) -> list[Picture]:
    """Draw those of the pictures that there are as PNG files, NAME.png, and hand them to the loggers.

    One that the browser draws has no file. One that fails is left out with a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown, files = [], []
    for number, draw in enumerate(pictures):
        name = draw.__name__
        say(DRAWING, number, len(pictures), state=name)
        file = folder / f"{name}.png"
        with sparing(file, f"picture {name}"):
            figure = draw(results)
            if figure is None:
                continue
            content: bytes | InteractiveCells
            if isinstance(figure, Figure):
                figure.set_dpi(DPI)
                with whole_file(file) as part:
                    FigureCanvasAgg(figure).print_png(part)  # savefig would draw it twice
                content = file.read_bytes()
                files.append(file)
            else:
                content = figure
            shown.append(Picture(*title_and_caption(draw), content, section_of(draw)))
    say(DRAWING, len(pictures), len(pictures), has_ended=True)
    for logger in loggers:
        with sparing(folder, f"pictures in {type(logger).__name__}", keep=True):
            _log_pictures(files, logger)
    return shown


def _log_pictures(files: Sequence[Path], logger: Logger) -> None:
    if isinstance(logger, TensorBoardLogger):
        with closing(FileWriter(logger.log_dir)) as events:  # the logger's own would encode pixels again
            for file in files:
                with Image.open(file) as picture:
                    width, height = picture.size
                image = Summary.Image(
                    width=width, height=height, colorspace=RGBA, encoded_image_string=file.read_bytes()
                )
                events.add_summary(Summary(value=[Summary.Value(tag=file.stem, image=image)]))
    elif isinstance(logger, WandbLogger):
        import wandb

        logger.experiment.log({file.stem: wandb.Image(str(file)) for file in files})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")
