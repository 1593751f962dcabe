"""Write defaults and comments into conf/, as the package declares them, and docs/settings.md: make settings

A file of conf/ is written by hand, but for the default and the comment in the line of a setting, which are
those that the package declares (``nbmix.core.declared``). A setting without a line is an error, and so is a
line without a setting. docs/settings.md then has every key of conf/.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from nbmix.app.settings import settings_of
from nbmix.core.declared import REQUIRED, Declared, shown

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"
GROUPS = {  # folder of conf/ -> how its choices are made, and what they are about
    "model": ("model=", "what is fitted, and how"),
    "m_step": ("m_step@model.m_step=", "the M step of `model=em`"),
    "start": ("start=", "where a fit begins"),
    "data": ("data=", "the cells"),
    "trainer": ("trainer=", "devices, processes and epochs"),
    "logger": ("logger=", "where what is logged while fitting goes"),
    "callbacks": ("callbacks=", "beside the fit"),
    "sweep": ("sweep=", "many fits in one command"),
    "experiment": ("experiment=", "whole set-ups by name"),
}
LINE = re.compile(r"( *)([\w.]+):(?: +([^#\s].*?))?(?: +# (.*))?")  # indent, key, value, comment
PREFIX = {"m_step": "model.m_step"}  # of the keys of a group, where it is not the group's name
PARTS = {"data/zheng": "of `mix2`, `mix4` and `mix10`"}
HOMES = {"": "config", "evaluation": "config", "search": "optuna"}  # files that hold groups without a target
HEAD = """# Settings

These are all settings of a run, with their defaults. `make settings` writes this page.

On the command line a setting is `key=value`, and a choice of a whole file is `group=choice`:
`python train.py model=amortized model.lr=3e-4`. `null` means nothing. With `-m` a list of values, as in
`model.n_components=2,3,4`, makes one fit for each.

`python train.py ... --cfg job` prints the settings that a run would use. Those that a run has used are in
`.hydra/config.yaml` of its folder. `python train.py --hydra-help` explains the keys of Hydra itself.

In Python the same settings are arguments of `nbmix.NBMixture`. Settings of a model that it does not name go
into `model_settings`, and settings of a start into an object such as
`nbmix.starts.random.RandomStart(n_starts=8)`.
"""


class Key(NamedTuple):
    """One key: its dotted name, its default as it stands in the file, and what it means."""

    name: str
    default: str
    meaning: str


class Choice(NamedTuple):
    """One file: the comment at its head, the names of its defaults, and its keys."""

    meaning: str
    based_on: list[str]
    keys: list[Key]


def read_choice(path: Path) -> Choice:
    """A file of conf/, comments and all. It keeps to a part of YAML: mappings of plain values, one a line."""
    lines = path.read_text().splitlines()
    head = [line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @")]
    group = path.parent.name
    top = [] if "# @package _global_" in lines or group == "conf" else PREFIX.get(group, group).split(".")
    based_on = [
        found[1]
        for line in lines
        if (found := re.match(r"  - (?:override )?(/?[\w@./]+(?:: \w+)?)", line)) and found[1] != "_self_"
    ]
    return Choice(" ".join(head), based_on, list(_keys(lines, top)))


def _keys(lines: list[str], top: list[str]) -> Iterator[Key]:
    path: list[str] = []
    for line in lines:
        found = LINE.fullmatch(line.split("# @")[0])
        if not found or line.lstrip().startswith("#"):
            continue
        indent, name, value, meaning = found.groups()
        path = [*path[: len(indent) // 2], name]
        if name in ("_target_", "defaults") or "defaults" in path or (not value and not meaning):
            continue
        if value == "|":  # a text of several lines, which says itself what it is
            continue
        yield Key(".".join([*top, *path]), value or "a list", meaning or "")


def files() -> list[Path]:
    """All files of conf/ that Hydra composes."""
    return [ROOT / "conf" / "config.yaml", *sorted((ROOT / "conf").glob("*/*.yaml"))]


def filled(path: Path) -> str:
    """The content of a file of conf/, with defaults and comments as they are declared.

    Raises:
        ValueError: a setting has no line, or a line has no setting.
    """
    groups = dict(_declared(OmegaConf.to_container(OmegaConf.load(path)), "", path.stem))  # type: ignore[arg-type]
    missing = {f"{group}.{name}".lstrip(".") for group, settings in groups.items() for name in settings}
    lines, place = [], []
    for line in path.read_text().splitlines():
        if found := LINE.fullmatch(line):
            indent, name, value, _ = found.groups()
            place = [*place[: len(indent) // 2], name]
            settings = groups.get(".".join(place[:-1]))
            if settings is not None and name in settings:
                missing.remove(".".join(place))
                line = f"{indent}{name}:{_default(settings[name], value)} # {settings[name].setting.meaning}"
            elif settings is not None and value and name not in ("_target_", "defaults"):
                raise ValueError(f"{path}: {'.'.join(place)} is not declared")
        lines.append(line)
    if missing:
        raise ValueError(f"{path}: has no line for {', '.join(sorted(missing))}")
    return "\n".join(lines) + "\n"


def _declared(values: Mapping[str, Any], group: str, file: str) -> Iterator[tuple[str, dict[str, Declared]]]:
    """The groups of settings in a file, and what is declared of them."""
    if str(values.get("_target_")).startswith("nbmix.") or HOMES.get(group) == file:
        yield group, settings_of(group, values)
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _declared(value, f"{group}.{name}".lstrip("."), file)


def _default(one: Declared, value: str | None) -> str:
    """As YAML; a list below the line, or a value of other settings, stays as it is."""
    if value is None or "${" in value:
        return f" {value}" if value else ""
    if one.default is REQUIRED:
        return " ???"
    if isinstance(one.default, tuple | list):
        return f" [{', '.join(one.default)}]"
    return f" {shown(one.default)}".replace("e-0", "e-")


def choices(group: str) -> dict[str, Choice]:
    """The files of a group by name."""
    return {path.stem: read_choice(path) for path in sorted((ROOT / "conf" / group).glob("*.yaml"))}


def page() -> str:
    """The content of docs/settings.md."""
    text = [HEAD, "## Settings of every run\n", *_table(read_choice(ROOT / "conf" / "config.yaml").keys)]
    for group, (selector, about) in GROUPS.items():
        text.append(f"## `{selector}`: {about}\n")
        for name, choice in choices(group).items():
            part = PARTS.get(f"{group}/{name}")
            text.append(f"### {part}\n" if part else f"### `{selector}{name}`\n")
            if choice.meaning:
                text.append(f"{choice.meaning}\n")
            if brought := _brought(group, choice):
                text.append(f"{brought}\n")
            if any(key.meaning for key in choice.keys):
                text += _table(choice.keys)
            elif choice.keys:
                named = ", ".join(f"`{key.name}={key.default}`" for key in choice.keys)
                text.append(textwrap.fill(f"It sets {named}.", 120, break_on_hyphens=False) + "\n")
    text.append(
        "## `wandb sweep conf/wandb_sweep.yaml`\n\n"
        "This is a file of Weights & Biases. Comments in it say what it does.\n"
    )
    return "\n".join(text)


def _brought(group: str, choice: Choice) -> str:
    """What a file takes from others, in words."""
    said = []
    for line in choice.based_on:
        place, _, value = line.lstrip("/").partition(": ")
        if not value:
            said.append(f"the keys {PARTS.get(f'{group}/{place}', f'of `{group}={place}`')}")
        elif place == f"{group}@inner":
            said.append(f"`{group}.inner`, with the keys of `{group}={value}`")
        else:
            said.append(f"`{place}={value}`")
    return f"It also sets {', '.join(said)}." if said else ""


def _table(keys: list[Key]) -> list[str]:
    rows = [f"| `{key.name}` | {_shown(key.default)} | {key.meaning} |" for key in keys]
    return ["| key | default | meaning |", "|---|---|---|", *rows, ""]


def _shown(default: str) -> str:
    if default == "???":
        return "to be given"
    return default if default == "a list" else f"`{default}`"


if __name__ == "__main__":
    for path in files():
        path.write_text(filled(path))
    PAGE.write_text(page())
