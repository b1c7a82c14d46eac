"""Names of the Hugging Face Hub, told from paths: a mistyped path must not become a download."""

from __future__ import annotations

from pathlib import Path


def is_hub_name(name: str, endings: tuple[str, ...] = ()) -> bool:
    """Whether a name that is no path on this machine can be OWNER/NAME on the hub.

    Args:
        name: what the user gave.
        endings: of file names, which hub names do not have.
    """
    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) != 2 or path.parent.is_dir():
        return False
    return not name.lower().endswith(endings)
