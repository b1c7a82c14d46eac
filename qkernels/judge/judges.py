"""Who says which of two answers is better: a function of the user's, or a model that is asked in both orders."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..preference_classifier import PreferenceClassifier
from ..text.characters import first_line
from .options import JudgeError

JUDGE_TEMPLATE = """\
Below are an instruction and two responses to it. Judge which response is more correct, helpful and to the point. Do \
not prefer a response because of its length or its position.

Instruction:
{prompt}

{response}

Which response is better? Please answer with just A or B"""

_FIRST = ("A", " A", "Response A", "(A)")
_SECOND = ("B", " B", "Response B", "(B)")
_WORDS = {"first": 1.0, "second": 0.0, "tie": 0.5}


class ModelJudge:
    """A language model that is asked which of two responses is better.

    It sees the instruction and both responses, A and B, and is told to answer with just A or B. The verdict is p_A /
    (p_A + p_B) of its next token (`qkernels.preference_classifier`).

    Args:
        model: a causal language model of transformers, instruction-tuned.
        tokenizer: its tokenizer.
        template: the question, with `{prompt}` and `{response}` in it; both responses take the place of the latter.
        batch_tokens: as in `PreferenceClassifier`.

    Raises:
        ValueError: a template without its fields; a tokenizer for which neither spelling of A or B is one token.
    """

    def __init__(self, model: Any, tokenizer: Any, *, template: str = JUDGE_TEMPLATE, batch_tokens: int | None = None):
        self._classifier = PreferenceClassifier(
            model, tokenizer, template=template, yes=_FIRST, no=_SECOND, batch_tokens=batch_tokens
        )

    def question(self, prompt: str, first: str, second: str) -> list[int]:
        """Token ids of the question."""
        return self._classifier.question(prompt, both_responses(first, second))

    def probabilities(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """How probable it is that the response shown first is the better one, `[N]` between 0 and 1.

        Args:
            prompts, first, second: one each.

        Raises:
            ValueError: a question longer than the model takes.
        """
        responses = [both_responses(a, b) for a, b in zip(first, second, strict=True)]
        return self._classifier.scores(list(prompts), responses).double().tolist()


def both_responses(first: str, second: str) -> str:
    """Two responses as the question shows them."""
    return f"Response A:\n{first or '(no answer)'}\n\nResponse B:\n{second or '(no answer)'}"


def question_text(prompt: str, first: str, second: str, template: str = JUDGE_TEMPLATE) -> str:
    """The question as text, for a judge outside of this package."""
    before, _, rest = template.partition("{prompt}")
    middle, _, after = rest.partition("{response}")
    return before + prompt + middle + both_responses(first, second) + after


class Scorer:
    """A function of the user's.

    Args:
        name: "module:function" or "file.py:function". A function of two arguments, (prompt, answer), returns a number,
            more being better. One of three, (prompt, first, second), returns how probable it is that the first answer
            is the better one, between 0 and 1, or "first", "second" or "tie"; it is asked in both orders.

    Attributes:
        compares: whether it sees both answers.
        fingerprint: its name, and what tells the contents of its file from others.

    Raises:
        JudgeError: it cannot be imported, or takes another number of arguments.
    """

    def __init__(self, name: str):
        self.name = name
        self._function, source = _function(name)
        contents = source.read_bytes() if source is not None and source.is_file() else b""
        self.fingerprint = f"{name}, {hashlib.sha256(contents).hexdigest()[:16]}"
        try:
            parameters = list(inspect.signature(self._function).parameters.values())
        except (TypeError, ValueError) as error:
            raise JudgeError(f"--scorer {name}: its arguments cannot be told ({first_line(error)})") from None
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = sum(p.default is p.empty for p in positional)
        if needed not in (2, 3) or any(p.kind == p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
            raise JudgeError(
                f"--scorer {name}: expected a function of (prompt, answer) or of (prompt, first, second), found"
                f" {needed} arguments that have no default"
            )
        self.compares = needed == 3

    def score(self, number: int, prompt: str, answer: str) -> float:
        """The score of one answer.

        Raises:
            JudgeError: the function raised, or returned no finite number; names the prompt.
        """
        value = self._call(number, prompt, answer)
        if isinstance(value, str) or not _is_number(value):
            raise JudgeError(f"--scorer {self.name}: prompt {number}: expected a finite number, got {value!r}")
        return float(value)

    def compare(self, number: int, prompt: str, first: str, second: str) -> float:
        """How probable it is that the first answer is the better one.

        Raises:
            JudgeError: the function raised, or returned something else; names the prompt.
        """
        value = self._call(number, prompt, first, second)
        if isinstance(value, str) and value in _WORDS:
            return _WORDS[value]
        if isinstance(value, str) or not _is_number(value) or not 0 <= float(value) <= 1:
            raise JudgeError(
                f"--scorer {self.name}: prompt {number}: expected a number between 0 and 1, 'first', 'second' or"
                f" 'tie', got {value!r}"
            )
        return float(value)

    def _call(self, number: int, *arguments: str) -> Any:
        try:
            return self._function(*arguments)
        except Exception as error:
            raise JudgeError(
                f"--scorer {self.name}: prompt {number}: {type(error).__name__}: {first_line(error)}"
            ) from error


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _function(name: str) -> tuple[Callable[..., Any], Path | None]:
    """The function, and the file that it is in."""
    module_name, colon, function_name = name.rpartition(":")
    if not (colon and module_name and function_name):
        raise JudgeError(f"--scorer {name}: expected module:function or file.py:function")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            if not path.is_file():
                raise JudgeError(f"--scorer {name}: {path}: no such file")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            shadowed = sys.modules.get(spec.name)
            sys.modules[spec.name] = module  # dataclasses look their module up there
            try:
                spec.loader.exec_module(module)
            finally:
                del sys.modules[spec.name]
                if shadowed is not None:
                    sys.modules[spec.name] = shadowed
        else:
            # As `python -m` does: a module in the working directory is found.
            sys.path.insert(0, "")
            try:
                module = importlib.import_module(module_name)
            finally:
                sys.path.remove("")
    except JudgeError:
        raise
    except Exception as error:
        raise JudgeError(
            f"--scorer {name}: cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise JudgeError(f"--scorer {name}: {module_name} has no function {function_name!r}")
    file = getattr(module, "__file__", None)
    return function, None if file is None else Path(file)
