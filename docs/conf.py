"""The documentation site: `make docs`. Its sources are README.md and the other Markdown files where they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import qkernels

sys.path.insert(0, str(Path(__file__).parent / "ext"))

project = "qkernels"
copyright = "the authors of qkernels; Apache-2.0"
version = release = qkernels.__version__

# The source directory is the repository, so that links hold there and here. Only these files are read.
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**", "bench/results/**"]
exclude_patterns = ["docs/ext", "docs/static", "**/.*", "build", "dist"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx_design", "docstrings", "public_names"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

highlight_language = "none"  # of blocks that name no language
pygments_style = "friendly"
pygments_dark_style = "monokai"

html_theme = "furo"
html_title = "qkernels"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

# Caption -> (title in the navigation, page). A pattern has no title: its pages have their own.
NAVIGATION: dict[str, list[tuple[str, str]]] = {
    "Guides": [
        ("Installing", "docs/installing"),
        ("From logits", "docs/logits"),
        ("From hidden states", "docs/linear"),
        ("Losses", "docs/losses"),
        ("Which loss", "docs/objectives"),
        ("TRL and transformers", "docs/integrations"),
        ("Training", "docs/train"),
        ("Data formats", "docs/data"),
        ("Use it in ...", "docs/frameworks"),
        ("Scoring", "docs/score"),
        ("Judging", "docs/judge"),
        ("Search and decoding", "docs/search"),
        ("Numbers beside an engine", "docs/numerics"),
        ("Monitoring", "docs/monitor"),
        ("Scaling", "docs/scaling"),
        ("The demo", "docs/demo"),
        ("What holds at the edges", "docs/edges"),
        ("Troubleshooting", "docs/troubleshooting"),
    ],
    "API": [
        ("Functions and results", "docs/api/functions"),
        ("Losses", "docs/api/objectives"),
        ("TRL and transformers", "docs/api/integrations"),
        ("Scoring and monitoring", "docs/api/scores"),
        ("Search and decoding", "docs/api/search"),
        ("Training", "docs/api/train"),
        ("Data, reports, command line", "docs/api/data"),
    ],
    "Project": [
        ("Architecture", "docs/architecture"),
        ("GPU kernels", "docs/kernels"),
        ("Results", "docs/results"),
        ("", "bench/results/*"),
        ("Contributing", "CONTRIBUTING"),
        ("Versions", "docs/versioning"),
        ("Compatibility", "docs/compatibility"),
        ("Changelog", "CHANGELOG"),
        ("Security", "SECURITY"),
    ],
}


def _toctrees() -> str:
    lines = []
    for caption, pages in NAVIGATION.items():
        entries = [f"{title} <{page}>" if title else page for title, page in pages]
        lines += ["", "```{toctree}", f":caption: {caption}", ":hidden:", ":glob:", *entries, "```"]
    return "\n".join(lines) + "\n"


def _complete(app: Any, name: str, source: list[str]) -> None:
    """The navigation, which GitHub would show as code if it were in README.md; titles of generated tables."""
    if name == root_doc:
        source[0] += _toctrees()
    elif name.startswith("bench/results/") and not source[0].startswith("# "):
        source[0] = f"# Measured: {Path(name).name}\n\n{source[0]}"


def _write_index(app: Any, exception: Exception | None) -> None:
    """A server looks for index.html."""
    if exception is None and app.builder.format == "html":
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>'
        (Path(app.outdir) / "index.html").write_text(page + "\n", encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("source-read", _complete)
    app.connect("build-finished", _write_index)
