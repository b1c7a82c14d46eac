"""The README's examples run as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int) -> None:
    """Each python block by itself, in a namespace of its own."""
    exec(compile(EXAMPLES[number], f"README example {number + 1}", "exec"), {"__name__": "__main__"})


def test_examples_were_found() -> None:
    assert len(EXAMPLES) >= 2
