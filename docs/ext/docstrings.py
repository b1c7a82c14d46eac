"""A Sphinx extension: the docstrings of this package as reStructuredText.

They are Markdown with Google's sections (`Args:`, `Returns:`, `Raises:`). Two habits go beyond what sphinx.ext.napoleon
reads: a line may stand for several names (`name, name: text`), and a section may be a sentence (`As token_stats.`). The
fields of a NamedTuple or dataclass are such lines too, without a section. Each line becomes an item of a list here. A
name in `Args:` that the signature does not have is a warning, hence an error of `make docs`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Collection
from typing import Any

from sphinx.util import logging

log = logging.getLogger(__name__)

_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$")
_ITEM = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): (?=\S)")
_CODE = re.compile(r"(`+)(.+?)\1")


def inline(text: str) -> str:
    """Markdown's `code` as reStructuredText's, and everything else as plain text."""
    parts: list[str] = []
    end = 0
    for code in _CODE.finditer(text):
        parts += [_plain(text[end : code.start()]), f"\\ ``{code[2]}``\\ "]
        end = code.end()
    return "".join([*parts, _plain(text[end:])])


def _plain(text: str) -> str:
    return re.sub(r"([\\*`|_])", r"\\\1", text)


def _sections(text: str) -> list[tuple[str, list[str]]]:
    """Title and dedented lines of each section; what belongs to none has the title ""."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        section = _SECTION.match(line)
        if section:
            parts.append((section[1], []))
            continue
        if parts[-1][0] and line and not line.startswith(" "):
            parts.append(("", []))
        parts[-1][1].append(line)
    return [(title, textwrap.dedent("\n".join(lines)).strip("\n").splitlines()) for title, lines in parts]


def _blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines that a blank line or a change to or from an indented block separates."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def restructured(
    text: str, fields: Collection[str] = (), parameters: Collection[str] | None = None, where: str = ""
) -> list[str]:
    """The docstring as lines of reStructuredText.

    Args:
        text: the docstring, without indentation.
        fields: names that begin an item outside of sections.
        parameters: what `Args:` may name; None for anything.
        where: the object, for warnings.
    """
    out: list[str] = []
    for title, lines in _sections(text):
        if title:
            out += [f"**{'Arguments' if title == 'Args' else title}**", ""]
        for block in _blocks(lines):
            if all(line.startswith("    ") for line in block):
                out += ["::", "", *block, ""]
                continue
            item: list[str] = []
            paragraph: list[str] = []
            for line in block:
                found = _ITEM.match(line) if title in ("", "Args", "Attributes", "Raises") else None
                names = found[1].replace("*", "").split(", ") if found else []
                if title == "Args" and parameters is not None:
                    for name in sorted(set(names) - set(parameters)):
                        log.warning("%s: the docstring describes %r, which is not a parameter", where, name)
                if found and (title or set(names) <= set(fields)):
                    if paragraph:
                        out += [*paragraph, ""]
                        paragraph = []
                    heads = ", ".join(f"``{name}``" for name in found[1].split(", "))
                    item = [f"- {heads}: {inline(line[found.end() :])}"]
                    out += item
                elif item and line.startswith(" "):
                    out.append(f"  {inline(line.strip())}")
                else:
                    if item:
                        out.append("")
                        item = []
                    marker, rest = ("- ", line[2:]) if line.startswith("- ") else ("", line)
                    indent = "  " if not marker and line.startswith("  ") else ""
                    paragraph.append(f"{indent}{marker}{inline(rest.strip())}")
            out += [*paragraph, ""]
    return out


def _parameters(what: str, thing: Any) -> list[str] | None:
    try:
        return list(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return None


def _process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    fields: list[str] = []
    if what == "data":  # an object has its type's docstring; the page says what it is
        lines.clear()
    if what == "class":
        fields = [*getattr(thing, "_fields", ()), *getattr(thing, "__dataclass_fields__", ()), *vars(thing)]
    lines[:] = restructured("\n".join(lines), fields, _parameters(what, thing), name)


def _skip(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Fields of a NamedTuple are described in its docstring."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
