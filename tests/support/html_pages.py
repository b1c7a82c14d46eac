"""Reads the HTML that the report, the heat map and the commands write, and text that tries to break out of it."""

from __future__ import annotations

from html.parser import HTMLParser

NASTY = '<script>alert(\'x\')</script>" onmouseover="y" &amp; </style> <!-- ]]>'
VOID = {"meta", "br", "line", "polyline"}


class Tree(HTMLParser):
    """Elements with attributes and own text, in order; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self._open: list[dict] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {[e['tag'] for e in self._open]}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1]["text"] += data

    def of(self, css_class: str) -> list[dict]:
        return [e for e in self.elements if css_class in (e.get("class") or "").split()]
