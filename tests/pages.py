"""The README and the docs: their blocks of code and commands."""

import re
from pathlib import Path
from typing import NamedTuple

from runners import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    needs: str  # or ""
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    text = page.read_text()
    pattern = r"(?:^<!-- needs: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$"
    for match in re.finditer(pattern, text, re.M | re.S):
        line = text.count("\n", 0, match.start(2)) + 1
        yield Block(page, line, match[2], match[1] or "", match[3])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]


def commands_of(text):
    """The commands of a shell block, each a list of words; `&&` and the end of a line end a command."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split("#")[0].split("&&"):
            if words := command.replace("'", " ").split():
                yield words
