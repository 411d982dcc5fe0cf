"""The pages of the project, and the Python blocks in them that tests run.

A block has a name, unique over all pages, in a comment before its fence: `<!-- test: name -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("", "dbsession/**/", "deploy/**/", "tests/**/")
    for path in sorted(ROOT.glob(f"{folder}*.md"))
}
"""The text of each page by its path in the checkout."""

NAMED_BLOCKS = [
    found
    for text in PAGES.values()
    for found in re.findall(r"<!-- test: (\S+) -->\n```python\n(.*?)^```$", text, re.M | re.S)
]
BLOCKS: dict[str, str] = dict(NAMED_BLOCKS)


def table(page: str, first_heading: str) -> str:
    """Return the table of `page` whose first column has that heading."""
    found = PAGES[page].partition(f"| {first_heading} |")[2].partition("\n\n")[0]
    assert found, f"{page} has no table of {first_heading!r}"
    return found


def rows(page: str, first_heading: str) -> list[list[str]]:
    """Return the rows of that table below its headings, each as its cells, all of which say something."""
    lines = [line for line in table(page, first_heading).splitlines()[2:] if line.startswith("|")]
    found = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert found and all(all(row) for row in found), (page, first_heading)
    return found
