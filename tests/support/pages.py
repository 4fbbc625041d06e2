"""Reading a page of HTML strictly: every element closed in order, every id once, everything within the page itself."""

import base64
import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "img", "link", "input"}
REMOTE = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")


class Page(HTMLParser):
    """What a page has, gathered while it is checked."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.files: dict[str, str] = {}
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute twice: {attrs}"
        assert not any(name.startswith("on") for name in given), attrs
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in REMOTE if name in given]
        if "download" in given:
            kind, _, content = given["href"].partition(";charset=utf-8;base64,")
            assert kind in ("data:text/csv", "data:application/json")
            assert given["download"] not in self.files
            self.files[given["download"]] = base64.b64decode(content).decode()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        opened = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def text(self, *tags: str) -> list[str]:
        """What stands in elements of these kinds, in all but scripts and styles without."""
        return [text for tag, text in self.texts if (tag in tags if tags else tag not in ("script", "style"))]

    def json(self, name: str) -> Any:
        """A file to download, as standard JSON, which knows no NaN."""
        return json.loads(self.files[name], parse_constant=lambda word: _refuse(f"{word} in {name}"))

    def csv(self, name: str) -> list[dict[str, str]]:
        """A file to download, by row."""
        return list(csv.DictReader(io.StringIO(self.files[name], newline="")))


def _refuse(message: str) -> None:
    raise AssertionError(message)


def read_page(file: Path) -> Page:
    """A page that needs nothing but itself."""
    html = file.read_text(encoding="utf-8")
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert inner <= set(page.ids), inner - set(page.ids)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert page.tags.count("script") == page.tags.count("style") == 1
    for words in ("http:", "https:", "url(//", "@import", "<link", "javascript:"):
        assert words not in html, words
    return page
