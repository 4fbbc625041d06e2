"""Every relative link of every Markdown file leads to a file of the repository, and to a heading where it names one."""

import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from support.markdown import anchors, links
from support.places import ROOT


def _files() -> list[Path]:
    """The Markdown files that are committed or new, without those that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sorted(file for name in listed.split("\0") if name and (file := ROOT / name).is_file())


def _broken(file: Path, root: Path = ROOT) -> list[str]:
    """The relative links of a file that lead nowhere within the repository."""
    found = []
    for link in links(file):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = file.parent / unquote(parts.path) if parts.path else file
        if not target.exists():
            found.append(f"{link}: no such file")
        elif not target.resolve().is_relative_to(root.resolve()):
            found.append(f"{link}: outside the repository")
        elif parts.fragment and (target.suffix != ".md" or parts.fragment not in anchors(target)):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    assert _broken(file) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `x`: y\n\n# Two\n\n# Two\n\n[a](#a-x-y) [b](#two-1) [c](#b) ![d](e.png) [f](..) [g](https://h.i)\n"
    )

    assert _broken(page, tmp_path) == [
        "#b: no such heading",
        "e.png: no such file",
        "..: outside the repository",
    ]


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = ROOT / "docs" / "README.md"
    linked = {(contents.parent / urlsplit(link).path).resolve() for link in links(contents)}
    pages = {*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")} - {contents}

    assert {str(page) for page in pages} - {str(page) for page in linked} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
