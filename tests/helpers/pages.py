"""Code on the pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.running import ROOT

EXTEND = ROOT / "docs" / "extend.md"


def blocks(page: Path, language: str) -> list[str]:
    """What stands between the fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def write_files(page: Path, folder: Path) -> None:
    """Write every block under a line with a file's name, such as ```my_starts.py`:``, to that file."""
    for name, block in re.findall(
        r"^`(\S+)`:\n\n```\w+\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block)
