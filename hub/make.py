"""Writes this package as a kernel of the Hugging Face Hub: what `kernels.get_kernel` loads by name.

    python hub/make.py OUT        (`make hub-kernel` writes build/hub)

OUT/build/torch-cuda and OUT/build/torch-cpu each hold the engine of the package in pure Python (Triton and torch), its
layers and a metadata.json; OUT/README.md is the card. Where the qkernels wheel of the same version is installed, its
compiled extension is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Engine layers and public files that stand on nothing else.
PARTS = (
    "__init__.py", "_version.py", "reference.py", "core", "backends", "distributed", "objectives", "head", "autograd",
    "functional",
)  # fmt: skip
# GPUs that the Triton kernels are compiled for in the tests.
CAPABILITIES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
NAME = "qkernels"


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for backend in ("cpu", "cuda"):
        write_variant(out / "build" / f"torch-{backend}", backend)
    card = (ROOT / "hub" / "CARD.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(card.replace("{version}", package_version()), encoding="utf-8")
    print(f"{out}: {', '.join(sorted(path.name for path in (out / 'build').iterdir()))}")


def package_version() -> str:
    found = re.search(r'__version__ = "(.+)"', (ROOT / "qkernels" / "_version.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def kernel_version() -> int:
    """The Hub counts versions of a kernel in whole numbers: the package's major version, from 1."""
    return max(1, int(package_version().split(".")[0]))


def write_variant(folder: Path, backend: str) -> None:
    folder.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / "qkernels" / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, folder / part)
    shutil.copy(ROOT / "hub" / "layers.py", folder / "layers.py")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    init = folder / "__init__.py"
    init.write_text(init.read_text(encoding="utf-8") + "\nfrom . import layers  # noqa: E402, F401\n", encoding="utf-8")
    # Older loaders look for a package of the kernel's name inside of the variant.
    (folder / NAME).mkdir()
    (folder / NAME / "__init__.py").write_text(COMPATIBLE, encoding="utf-8")
    # Part of the name under which a process loads it: another state of the sources is another module.
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        state.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    metadata = {
        "id": f"_{NAME}_{backend}_{state.hexdigest()[:10]}",
        "name": NAME,
        "version": kernel_version(),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend, **({"archs": CAPABILITIES} if backend == "cuda" else {})},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


COMPATIBLE = '''"""The kernel under its own name, for loaders that put a variant on the import path."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location("_qkernels_variant", _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
globals().update({name: getattr(_module, name) for name in [*_module.__all__, "layers"]})
__all__ = [*_module.__all__, "layers"]
'''


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
