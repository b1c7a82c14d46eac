"""The examples of the README and of the guides from logits and from hidden states run as printed."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "logits.md", ROOT / "docs" / "linear.md"]
EXAMPLES = [
    e for page in PAGES for e in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """What the snippets on models take for granted."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    import tiny_models

    prompt, text = "What is the capital of Peru? Lima is the capital.", "Lima"
    tokenizer = tiny_models.tokenizer([prompt, "Yes No yes no", "The answer is Lima, I think."])
    made = [
        tiny_models.llama(len(tokenizer), seed=seed, attn_implementation="eager", max_position_embeddings=4096)
        for seed in (0, 1)
    ]
    for model in made:
        model.generation_config.max_new_tokens = 6
    return {
        "tokenizer": tokenizer, "model": made[0], "policy": made[0], "reference": made[1], "prompt": prompt,
        "text": text,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, request, tmp_path, monkeypatch) -> None:
    """Each python block by itself, in a namespace of its own."""
    code, namespace = EXAMPLES[number], {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)
    if "reference_logits=reference_logits" in code:
        logits, reference_logits = torch.randn(4, 8, 100, requires_grad=True), torch.randn(4, 8, 100)
        namespace |= {"logits": logits, "reference_logits": reference_logits, "labels": torch.randint(0, 100, (4, 8))}
    if "tokenizer" in code:
        namespace |= request.getfixturevalue("models")
    if "TokenDPOTrainer" in code:
        pytest.importorskip("trl", reason="TRL is not installed")
        from datasets import Dataset

        from qkernels.integrations.trl import TokenDPOConfig

        rows = [{"prompt": "What is it?", "chosen": " Lima.", "rejected": " I think."}] * 4
        namespace["preferences"] = Dataset.from_list(rows)
        quiet = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 1, "disable_tqdm": True}
        monkeypatch.setattr(TokenDPOConfig, "__init__", functools.partialmethod(TokenDPOConfig.__init__, **quiet))
    exec(compile(code, f"example {number + 1}", "exec"), namespace)


def test_examples_were_found() -> None:
    assert len(EXAMPLES) >= 4
