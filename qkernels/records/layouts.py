"""From a record to a `Preference`: which layout it is in, where the prompt ends, what the answers are."""

from __future__ import annotations

import difflib
import json
import math
import re
from typing import Any, NamedTuple

from .pairs import Message, Preference, Unusable, conversation, found, names, spoken, string

# The names of the two answers, the better one first.
_ANSWERS = (
    ("chosen", "rejected"),
    ("response_j", "response_k"),
    ("chosen_response", "rejected_response"),
)
_CONVERSATIONS = ("conversations", "conversation")
_QUESTIONS = ("question", "query")
_KNOWN = (
    "prompt, chosen, rejected (texts or messages); chosen, rejected (whole conversations, or HH-RLHF's 'Human:' and"
    " 'Assistant:'); messages or conversations, chosen, rejected; instruction, input, chosen, rejected; question,"
    " chosen, rejected; question, response_j, response_k; instruction, chosen_response, rejected_response; prompt,"
    " response_0, response_1, better_response_id; instruction, completions (with response and overall_score)"
)
_ALL_NAMES = (
    "prompt", "chosen", "rejected", "messages", "conversations", "instruction", "question", "response_j", "response_k",
    "completions",
)  # fmt: skip
# A column of ids that was a table's comes as bools, as floats (pandas, beside a null) or as texts (CSV).
_IDS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
_HH = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


class _Answers(NamedTuple):
    """The values of the better and the worse answer, what messages call them, and the fields they came from."""

    chosen: Any
    rejected: Any
    names: tuple[str, str]
    used: tuple[str, ...]


class _Prompt(NamedTuple):
    """The prompt as messages (None: there is none), whether it was a string, its name, the fields it came from."""

    messages: tuple[Message, ...] | None
    is_text: bool
    name: str
    used: tuple[str, ...]


def preference(record: Any) -> tuple[Preference, set[str]]:
    """The pair in a record, and the names of the fields that were read.

    Raises:
        Unusable: it is in no known layout, or holds no usable pair.
    """
    if not isinstance(record, dict):
        raise Unusable(f"expected an object with a prompt, 'chosen' and 'rejected', found {found(record)}")
    record = {name: value for name, value in record.items() if value is not None}
    answers = _answers(record)
    chosen, rejected = _sides(answers, record)
    prompt = _prompt(record, chosen)
    for name, messages in zip(answers.names, (chosen, rejected), strict=True):
        if not messages or messages[-1].role != "assistant":
            what = f"one from {messages[-1].role!r}" if messages else "no message"
            raise Unusable(f"expected {name!r} to end with a message from the assistant, found {what}")
        if not (messages[-1].content.strip() or messages[-1].more):
            raise Unusable(f"expected an answer in {name!r}, found only an empty one")
    context, better, worse = _split(prompt, chosen, rejected, answers.names)
    if "system" in record and string(record["system"], "system").strip():
        context = _with_system(context, record["system"])
    if not any(message.content.strip() for message in context):
        raise Unusable("expected a prompt, found only an empty one")
    if better == worse:
        first, second = answers.names
        raise Unusable(f"expected two different answers, found {first!r} and {second!r} identical")
    used = {*answers.used, *prompt.used, "messages", "system", "tools"}
    tools = _tools(record.get("tools"))
    if len(better) == len(worse) == 1 and not (better[0].more or worse[0].more):
        return Preference(context, better[0].content, worse[0].content, tools=tools), used
    return Preference(context, spoken(better), spoken(worse), (), better, worse, tools), used


# --- the answers ------------------------------------------------------------------------------------------------------


def _answers(record: dict[str, Any]) -> _Answers:
    for pair in _ANSWERS:
        if all(name in record for name in pair):
            return _Answers(record[pair[0]], record[pair[1]], pair, pair)
    if "completions" in record:
        return _best_and_worst(record["completions"])
    if {"response_0", "response_1", "better_response_id"} <= set(record):
        given = record["better_response_id"]
        better = _IDS.get(str(given).strip().lower())
        if better is None:
            raise Unusable(f"expected 'better_response_id' to be 0 or 1, found {found(given)}")
        pair = (f"response_{better}", f"response_{1 - better}")
        return _Answers(record[pair[0]], record[pair[1]], pair, (*pair, "better_response_id"))
    output = record.get("output")
    if "instruction" in record and isinstance(output, list) and len(output) == 2:
        return _Answers(output[0], output[1], ("output[0]", "output[1]"), ("output",))
    missing = next(name for name in ("chosen", "rejected") if name not in record)
    raise Unusable(f"expected the field {missing!r}, found only {names(record)}{_meant(record)}; known are: {_KNOWN}")


def _meant(record: dict[str, Any]) -> str:
    """Names that look like known ones with a slip."""
    close = {
        name: difflib.get_close_matches(str(name).lower(), _ALL_NAMES, 1, 0.75)
        for name in record
        if name not in _ALL_NAMES
    }
    slips = [f"{matches[0]!r} for {name!r}" for name, matches in close.items() if matches and matches[0] not in record]
    return f" (perhaps {', '.join(slips)})" if slips else ""


def _best_and_worst(completions: Any) -> _Answers:
    """UltraFeedback as it was collected: the completions with the highest and the lowest overall score."""
    if not isinstance(completions, list) or not all(
        isinstance(c, dict) and "response" in c and isinstance(c.get("overall_score"), (int, float))
        for c in completions
    ):
        raise Unusable(
            f"expected 'completions' to be a list of objects with 'response' and a number 'overall_score', found"
            f" {found(completions)}"
        )
    for completion in completions:
        score = completion["overall_score"]
        if isinstance(score, float) and not math.isfinite(score):  # NaN would end the sorting half-way
            raise Unusable(f"expected 'completions' with finite overall scores, found {found(score)}")
    ranked = sorted(completions, key=lambda completion: -completion["overall_score"])
    if len(ranked) < 2 or ranked[0]["overall_score"] == ranked[-1]["overall_score"]:
        raise Unusable("expected 'completions' with different overall scores, found fewer than two")
    sides = ("the best of 'completions'", "the worst of 'completions'")
    return _Answers(ranked[0]["response"], ranked[-1]["response"], sides, ("completions",))


def _sides(answers: _Answers, record: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Both answers as messages; with HH-RLHF's layout, the dialogues that the texts are."""
    texts = (answers.chosen, answers.rejected)
    prompts = ("prompt", "messages", "instruction", *_CONVERSATIONS, *_QUESTIONS)
    if all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in texts) and not any(
        name in record for name in prompts
    ):
        chosen, rejected = (_dialogue(string(text, name)) for text, name in zip(texts, answers.names, strict=True))
        return chosen, rejected
    chosen, rejected = (
        conversation(value, name, "assistant") for value, name in zip(texts, answers.names, strict=True)
    )
    return chosen, rejected


def _dialogue(text: str) -> tuple[Message, ...]:
    """HH-RLHF's texts: turns that begin with "Human:" and "Assistant:" after a blank line."""
    parts = _HH.split("\n\n" + text.strip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


# --- the prompt -------------------------------------------------------------------------------------------------------


def _prompt(record: dict[str, Any], chosen: tuple[Message, ...]) -> _Prompt:
    given = [name for name in ("prompt", *_CONVERSATIONS) if name in record]
    if len(given) > 1:
        raise Unusable(f"expected either {given[0]!r} or {given[1]!r}, found both")
    if given:
        value = record[given[0]]
        return _Prompt(conversation(value, given[0], "user"), isinstance(value, str), given[0], (given[0],))
    if "instruction" in record:
        return _instruction(record)
    for name in _QUESTIONS:
        if name in record:
            value = record[name]
            return _Prompt(conversation(value, name, "user"), isinstance(value, str), name, (name,))
    # Many sets with whole conversations as answers repeat the chosen one under this name.
    if "messages" in record and (len(chosen) < 2 or chosen[0].role == "assistant"):
        messages = conversation(record["messages"], "messages", "user")
        if messages[-len(chosen) :] == chosen:
            messages = messages[: -len(chosen)]
        return _Prompt(messages, False, "messages", ("messages",))
    return _Prompt(None, False, "prompt", ())


def _instruction(record: dict[str, Any]) -> _Prompt:
    """Alpaca's layout: an instruction, its input, and perhaps earlier rounds."""
    asked = conversation(record["instruction"], "instruction", "user")
    more = record.get("input")
    if more is not None and string(more, "input").strip():
        asked = (Message("user", f"{_only_text(asked)}\n{more}"),)
    earlier: list[Message] = []
    history = record.get("history", [])
    if not isinstance(history, list):
        raise Unusable(f"expected 'history' to be a list of rounds, found {found(history)}")
    for i, exchange in enumerate(history):
        if not (isinstance(exchange, list) and len(exchange) == 2):
            raise Unusable(f"expected 'history[{i}]' to be a question and an answer, found {found(exchange)}")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            earlier.append(Message(role, string(text, f"history[{i}]")))
    return _Prompt((*earlier, *asked), True, "instruction", ("instruction", "input", "history"))


def _only_text(messages: tuple[Message, ...]) -> str:
    """The text of a prompt that is one message."""
    if len(messages) != 1:
        raise Unusable(f"expected 'instruction' to be one text beside 'input', found {len(messages)} messages")
    return messages[0].content


def instruction(record: dict[str, Any]) -> tuple[Message, ...]:
    """The prompt of a record in Alpaca's layout: earlier rounds, the instruction and its input."""
    return _instruction(record).messages or ()


def _tools(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable(f"expected 'tools' to be a list of tools, or that as JSON, found {found(value)}") from None
    if value in (None, "", []) or (isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable(f"expected 'tools' to be a list of tools, found {found(value)}")
    return json.dumps(value, ensure_ascii=False)


# --- where the answers begin ------------------------------------------------------------------------------------------


def _split(
    prompt: _Prompt, chosen: tuple[Message, ...], rejected: tuple[Message, ...], called: tuple[str, str]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """The conversation before the answers, and both answers: what the two sides share at their beginning is context.

    The answers begin with the assistant: where the sides part at something else, such as what a tool returned, the
    assistant's turn before it begins them.
    """
    shortest = min(len(chosen), len(rejected))
    parting = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    shared = min(parting, shortest - 1)
    while shared and not chosen[shared].role == rejected[shared].role == "assistant":
        shared -= 1
    if not chosen[shared].role == rejected[shared].role == "assistant":
        first, second = called
        raise Unusable(
            f"expected {first!r} and {second!r} to be the same conversation up to an answer of the assistant, found"
            f" that they part at message {parting + 1}"
        )
    before = chosen[:shared]
    return _context(prompt, before, called[0]), chosen[shared:], rejected[shared:]


def _with_system(context: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The conversation after the system message of a field beside it, which it may repeat."""
    if not context or context[0].role != "system":
        return (Message("system", system), *context)
    if context[0].content.strip() != system.strip():
        raise Unusable("expected one system message, found 'system' and a different one in the conversation")
    return context


def _context(prompt: _Prompt, before: tuple[Message, ...], side: str) -> tuple[Message, ...]:
    """The conversation before the answers, from the prompt field and from what the answers repeat of it."""
    given = prompt.messages
    if given is None:
        if not before:
            raise Unusable("expected the field 'prompt' (or 'conversations'), found answers without one")
        return before
    if not before:
        return given
    if before[0].role == "assistant":  # turns that go on where the prompt ends
        return (*given, *before)
    # A string says nothing about a system message or earlier turns.
    if prompt.is_text:
        agrees = any(m.role == "user" and m.content.strip() == given[-1].content.strip() for m in before)
    else:
        agrees = before[: len(given)] == given
    if not agrees:
        raise Unusable(f"expected the conversation in {side!r} to contain {prompt.name!r}, found a different one")
    return before
