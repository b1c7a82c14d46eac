"""The examples of the README and of the guides from logits and from hidden states run as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "logits.md", ROOT / "docs" / "linear.md"]
EXAMPLES = [
    e for page in PAGES for e in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int) -> None:
    """Each python block by itself, in a namespace of its own."""
    exec(compile(EXAMPLES[number], f"example {number + 1}", "exec"), {"__name__": "__main__"})


def test_examples_were_found() -> None:
    assert len(EXAMPLES) >= 4
