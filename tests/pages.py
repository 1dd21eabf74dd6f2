"""The pages of the project: their text, their blocks of code and their tables."""

from __future__ import annotations

import re
from typing import NamedTuple

from cli import SCRIPTS

ROOT = SCRIPTS.parent
PAGES = ("README.md", "SKILL.md", *(f"references/{p.name}" for p in ROOT.glob("references/*.md")))
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in sorted(PAGES)}


class Block(NamedTuple):
    """A fenced block of a page."""

    heading: str
    language: str
    code: str


def blocks(page: str, language: str) -> list[Block]:
    found, heading = [], ""
    for match in re.finditer(
        r"^(#+ [^\n]*)$|^```(\w+)\n(.*?)^```$", TEXT[page], re.MULTILINE | re.DOTALL
    ):
        if match[1]:
            heading = match[1]
        elif match[2] == language:
            found.append(Block(heading, match[2], match[3]))
    return found


def prose(page: str) -> str:
    """The page without its blocks, in one line."""
    return " ".join(re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.MULTILINE | re.DOTALL).split())


def table(page: str, heading: str, number: int = 0) -> list[list[str]]:
    """The rows of a table below a heading, without its head."""
    section = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", unfenced(page), re.MULTILINE | re.DOTALL
    )
    assert section, f"{page} has no section {heading}"
    tables = re.findall(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", section[1], re.MULTILINE)
    return [
        [cell.strip() for cell in row.strip("|").split(" | ")]
        for row in tables[number].splitlines()
    ]


def unfenced(page: str) -> str:
    """The page without its blocks, whose comments look like headings."""
    return re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)


def first_cells(page: str, heading: str, number: int = 0) -> list[str]:
    return [row[0].strip("`") for row in table(page, heading, number)]
