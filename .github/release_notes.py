"""Print the section of CHANGELOG.md that belongs to a tag. Fails if the tag is not a release.

    python3 .github/release_notes.py v1.2.3

A release is a tag `vX.Y.Z` whose version is that of `qkernels/_version.py`, with a section `## X.Y.Z (YYYY-MM-DD)`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(tag: str, version_file: str, changelog: str) -> str:
    """The section's text. ValueError if the tag, the version and the changelog do not agree."""
    version = re.search(r'__version__ = "([^"]+)"', version_file)
    if version is None:
        raise ValueError("qkernels/_version.py has no __version__")
    if tag != f"v{version[1]}":
        raise ValueError(f"the tag is {tag}; expected v{version[1]}, the version in qkernels/_version.py")
    section = re.search(
        rf"^## {re.escape(version[1])} \((\d{{4}}-\d\d-\d\d)\)\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE
    )
    if section is None:
        raise ValueError(f"CHANGELOG.md has no section '## {version[1]} (YYYY-MM-DD)'")
    return section[2].strip() + "\n"


if __name__ == "__main__":
    try:
        text = release_notes(
            sys.argv[1],
            (ROOT / "qkernels" / "_version.py").read_text(encoding="utf-8"),
            (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        )
    except (IndexError, ValueError) as error:
        sys.exit(f"release_notes.py: {error if isinstance(error, ValueError) else 'expected a tag'}")
    sys.stdout.write(text)
