"""The two sides of a comparison: prompts and answers out of files, or answers that a model generates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..integrations.transformers.generation import plain_generation
from ..records.layouts import instruction, preference
from ..records.pairs import DataError, Message, Unusable, conversation, names
from ..records.sources import Source
from ..text.characters import first_line
from ..text.lengths import position_limit
from .options import JudgeError

PROMPT_FIELDS = ("prompt", "messages", "conversations", "question", "instruction")
_DIALOGUES = ("messages", "conversations")  # whole ones: where they end with an answer, the prompt is what precedes it
ANSWER_FIELDS = ("answer", "response", "output", "completion")

Prompt = tuple[Message, ...]


class Answer(NamedTuple):
    """An answer's text, and whether it ends by itself rather than at `--max-new-tokens`."""

    text: str
    finished: bool = True


def key_of(prompt: Prompt) -> str:
    """What tells one prompt from another."""
    return json.dumps([[message.role, message.content] for message in prompt], ensure_ascii=False)


def text_of(prompt: Prompt) -> str:
    """A prompt as one text: what the user says, or a conversation with who says it."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def as_records(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as files have it."""
    return [{"role": message.role, "content": message.content} for message in prompt]


# --- files ------------------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> tuple[list[Prompt], int]:
    """The prompts of a file, and how many were left out because they occur again.

    Args:
        path: of prompts: strings, objects with one of `PROMPT_FIELDS`, or preference pairs, whose prompts are taken.

    Raises:
        DataError: a record that cannot be used, by its place; no prompt at all.
    """
    prompts: dict[str, Prompt] = {}
    records = 0
    for place, record in Source(path).rows():
        records += 1
        try:
            prompt = _prompt(record)
        except Unusable as error:
            raise DataError(f"{path}, {place}: {error}") from None
        prompts.setdefault(key_of(prompt), prompt)
    if not prompts:
        raise DataError(f"{path}: expected at least 1 prompt, found 0")
    return list(prompts.values()), records - len(prompts)


def read_answers(path: Path) -> dict[str, tuple[Prompt, Answer]]:
    """Answers by the keys of their prompts.

    Raises:
        DataError: a record without a prompt or an answer; two different answers to one prompt.
    """
    found: dict[str, tuple[Prompt, Answer]] = {}
    for place, record in Source(path).rows():
        try:
            prompt = _prompt(record)
            text = _answer(record)
            answer = Answer(text, record.get("finished") is not False)
        except Unusable as error:
            raise DataError(f"{path}, {place}: {error}") from None
        earlier = found.setdefault(key_of(prompt), (prompt, answer))
        if earlier[1].text != answer.text:
            raise DataError(f"{path}, {place}: expected one answer to each prompt, found a second one to this")
    if not found:
        raise DataError(f"{path}: expected at least 1 answer, found 0")
    return found


def _prompt(record: Any) -> Prompt:
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        raise Unusable(f"expected a prompt or an object with one, found a value of type {type(record).__name__}")
    if not any(name in record for name in ANSWER_FIELDS):
        try:
            return preference(record)[0].prompt
        except Unusable:
            if "chosen" in record:
                raise
    for name in PROMPT_FIELDS:
        if record.get(name) is not None:
            prompt = instruction(record) if name == "instruction" else conversation(record[name], name, "user")
            if name in _DIALOGUES and len(prompt) > 1 and prompt[-1].role == "assistant":
                prompt = prompt[:-1]
            if not any(message.content.strip() for message in prompt):
                raise Unusable(f"expected a prompt in {name!r}, found only an empty one")
            system = record.get("system")
            if isinstance(system, str) and system.strip() and prompt[0].role != "system":
                prompt = (Message("system", system), *prompt)
            return tuple(Message(message.role, message.content) for message in prompt)
    raise Unusable(f"expected one of the fields {', '.join(map(repr, PROMPT_FIELDS))}, found {names(record)}")


def _answer(record: Any) -> str:
    if not isinstance(record, dict):
        raise Unusable(f"expected an object with a prompt and an answer, found a value of type {type(record).__name__}")
    for name in ANSWER_FIELDS:
        if record.get(name) is not None:
            turns = conversation(record[name], name, "assistant")
            if not turns or turns[-1].role != "assistant":
                raise Unusable(f"expected {name!r} to end with a message from the assistant")
            return turns[-1].content
    raise Unusable(f"expected one of the fields {', '.join(map(repr, ANSWER_FIELDS))}, found {names(dict(record))}")


# --- models -----------------------------------------------------------------------------------------------------------


class Generator:
    """A model that answers prompts.

    Args:
        option: "--a" or "--b", for messages.
        model, tokenizer: of transformers.
        max_new_tokens: longest answer.
        temperature: 0 for greedy answers.
        seed: of samples; an answer depends on it and on the block of prompts it is generated in.
    """

    def __init__(
        self, option: str, model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float, seed: int
    ) -> None:
        self.option, self.model, self.tokenizer = option, model, tokenizer
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self.limit = position_limit(model)

    def encode(self, number: int, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            JudgeError: it cannot be rendered, or leaves no room for an answer; names it.
        """
        where = f"{self.option}: prompt {number}"
        if self.chat:
            try:
                text = self.tokenizer.apply_chat_template(as_records(prompt), tokenize=False,
                                                          add_generation_prompt=True)  # fmt: skip
            except Exception as error:  # jinja2's errors, and whatever a template raises
                raise JudgeError(f"{where}: the chat template refuses it ({first_line(error)})") from error
        elif len(prompt) > 1:
            raise JudgeError(
                f"{where}: it is a conversation of {len(prompt)} messages, and the tokenizer has no chat template to"
                " write it with"
            )
        else:
            text = prompt[0].content
        ids = list(self.tokenizer(text, add_special_tokens=not self.chat, verbose=False)["input_ids"])
        if not ids:
            raise JudgeError(f"{where}: the tokenizer makes no token of it")
        if self.limit is not None and len(ids) + self.max_new_tokens > self.limit:
            raise JudgeError(
                f"{where}: {len(ids)} tokens and --max-new-tokens {self.max_new_tokens} are more than the {self.limit}"
                " that the model takes"
            )
        return ids

    @torch.no_grad()
    def answers(self, first: int, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers to a block of prompts, of which the first has this number."""
        encoded = [self.encode(first + i, prompt) for i, prompt in enumerate(prompts)]
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end]) | {self.tokenizer.eos_token_id}
        ends.discard(None)
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else next(iter(sorted(ends)), 0)
        longest = max(map(len, encoded))
        ids = torch.full((len(encoded), longest), pad)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(encoded):
            ids[row, longest - len(one) :] = torch.tensor(one)
            mask[row, longest - len(one) :] = 1
        device = next(self.model.parameters()).device
        how: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if self.temperature:
            how |= {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
            torch.manual_seed(((self.seed << 20) + first) % 2**63)
        with plain_generation(self.model):
            found = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(ends) or None,
                **how,
            )[:, longest:].cpu()
        answers = []
        for row in found.tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), None)
            text = self.tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
            answers.append(Answer(text, stop is not None))
        return answers


def blocks(missing: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of prompts that are generated together: the same blocks whatever was interrupted between them."""
    block: list[int] = []
    for number in missing:
        if block and number // size != block[0] // size:
            yield block
            block = []
        block.append(number)
    if block:
        yield block
