"""A preference pair and its messages, and reading messages in the forms that data sets use."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ..text.characters import PrintableError

# The names that data sets use for who is speaking, and ours.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
# Fields of a message, beside who speaks and what is said, that chat templates read.
_FURTHER = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_SEPARATOR = "\n\n"
_CONSTANTS = {True: "true", False: "false", None: "null"}


class DataError(PrintableError, ValueError):
    """Preference data that cannot be used; the message names the file, the place, what was expected and found."""


class Unusable(Exception):
    """What is wrong with a record, without the place: "expected ..., found ..."."""

    @property
    def reason(self) -> str:
        """The part of the message that records with the same fault share."""
        return str(self).split(", found")[0]


class Message(NamedTuple):
    """One turn of a conversation.

    role: "system", "user", "assistant" or "tool".
    content: what is said; "" where an assistant only calls tools.
    more: a JSON object of the further fields that chat templates read (`tool_calls`, `tool_call_id`, `name`,
        `reasoning_content`, `thinking`); "" for none.
    """

    role: str
    content: str
    more: str = ""

    def fields(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}


class Preference(NamedTuple):
    """A prompt with a better and a worse answer.

    prompt: the conversation up to the answer, at least one message.
    chosen, rejected: the assistant's answers; neither is blank, and they differ. Of a trajectory, all that the
        assistant says in it, its turns joined by a blank line.
    planted: character spans `[start, end)` of the rejected answer that are known to be wrong; empty if unknown.
    chosen_turns, rejected_turns: of a trajectory, all messages after the prompt: the assistant's turns, its tool calls,
        and what came between. Empty, both of them, where the answers are single texts.
    tools: the tools that the assistant may call, as the JSON that chat templates take; "" for none.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    planted: tuple[tuple[int, int], ...] = ()
    chosen_turns: tuple[Message, ...] = ()
    rejected_turns: tuple[Message, ...] = ()
    tools: str = ""

    def turns(self, side: str) -> tuple[Message, ...]:
        """What follows the prompt, as messages; `side` is "chosen" or "rejected"."""
        given: tuple[Message, ...] = getattr(self, f"{side}_turns")
        return given or (Message("assistant", getattr(self, side)),)

    def as_messages(self) -> dict[str, Any]:
        """The pair as TRL takes it: `prompt`, `chosen` and `rejected` as lists of messages, and `tools` if it has any.

        TRL itself counts everything after the prompt as the answer, also what the tools of a trajectory returned.
        """
        record: dict[str, Any] = {"prompt": [message.fields() for message in self.prompt]}
        record |= {side: [message.fields() for message in self.turns(side)] for side in ("chosen", "rejected")}
        return {**record, "tools": json.loads(self.tools)} if self.tools else record


def spoken(turns: tuple[Message, ...]) -> str:
    """What the assistant says in several turns, as one text."""
    return _SEPARATOR.join(message.content for message in turns if message.role == "assistant")


def spoken_places(turns: tuple[Message, ...]) -> list[int]:
    """Where the content of each turn begins in `spoken`; -1 of those that are not the assistant's."""
    places, position = [], 0
    for message in turns:
        if message.role == "assistant":
            places.append(position)
            position += len(message.content) + len(_SEPARATOR)
        else:
            places.append(-1)
    return places


def conversation(value: Any, name: str, role: str) -> tuple[Message, ...]:
    """Messages out of a string (spoken by `role`), one message or a list of them."""
    if isinstance(value, str):
        return (Message(role, string(value, name)),)
    if isinstance(value, dict):
        return (_message(value, name),)
    if isinstance(value, list):
        return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))
    raise Unusable(f"expected {name!r} to be a string, a message or a list of messages, found {found(value)}")


def message_keys(value: dict[str, Any]) -> tuple[str, str] | None:
    """The names of the fields that tell who speaks and what is said; None of an object that is no message."""
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if role_key in value and (content_key in value or value.get("tool_calls")):
            return role_key, content_key
    return None


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise Unusable(f"expected {name!r} to be a message, found {found(value)}")
    keys = message_keys(value)
    if keys is None:
        raise Unusable(
            f"expected {name!r} to have the fields 'role' and 'content' (or 'from' and 'value'), found {names(value)}"
        )
    role_key, content_key = keys
    said = string(value[role_key], f"{name}.{role_key}")
    if said.lower() not in ROLES:
        raise Unusable(f"expected {name}.{role_key} to be one of {', '.join(ROLES)}, found {found(said)}")
    role = ROLES[said.lower()]
    content, more = value.get(content_key), _further(value, role)
    if content is None and "tool_calls" in more:
        content = ""
    text = _text(content, f"{name}.{content_key}")
    if said.lower() == "function_call":
        more["tool_calls"], text = _calls_of(text, name), ""
    return Message(role, text, json.dumps(more, ensure_ascii=False, sort_keys=True) if more else "")


def _further(value: dict[str, Any], role: str) -> dict[str, Any]:
    """The fields for the chat template, arguments of tool calls as objects, which every template can write."""
    given = {key: value[key] for key in _FURTHER if value.get(key) not in (None, "", [])}
    if role != "tool":
        given.pop("name", None)
    if isinstance(given.get("tool_calls"), list):
        given["tool_calls"] = [_call(call) for call in given["tool_calls"]]
    return given


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
    return call


def _calls_of(text: str, name: str) -> list[Any]:
    """The tool calls that a ShareGPT turn from "function_call" holds as JSON."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if not (isinstance(calls, list) and calls and all(isinstance(call, dict) and "name" in call for call in calls)):
        raise Unusable(
            f"expected {name!r} to hold tool calls as JSON, with 'name' and 'arguments', found {found(text)}"
        )
    return [{"type": "function", "function": _call(call)} for call in calls]


def _text(value: Any, name: str) -> str:
    """A string, or the texts of a list of content parts."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        other = sorted({str(part["type"]) for part in value if part["type"] != "text"})
        if other:
            raise Unusable(f"expected {name!r} to be text, found content of type {', '.join(other)}")
        return "".join(string(part.get("text"), f"{name}.text") for part in value)
    return string(value, name)


def string(value: Any, name: str) -> str:
    """A string that is valid text."""
    if not isinstance(value, str):
        raise Unusable(f"expected {name!r} to be a string, found {found(value)}")
    try:
        value.encode()  # UTF-8 refuses half surrogate pairs and nothing else
    except UnicodeEncodeError:
        raise Unusable(
            f"expected {name!r} to be valid text, found half of a surrogate pair (a broken \\u escape)"
        ) from None
    return value


def names(record: dict[str, Any]) -> str:
    """The first names of a record's fields, for a message."""
    return ", ".join(repr(_short(name)) for name in list(record)[:8]) + (" ..." if len(record) > 8 else "") or "none"


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def found(value: Any) -> str:
    """A JSON value in few words."""
    if value is None or isinstance(value, bool):
        return _CONSTANTS[value]
    if isinstance(value, str):
        return repr(_short(value)) if value else "an empty string"
    if isinstance(value, (int, float)):
        return f"the number {_short(repr(value))}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object with the fields {names(value)}" if value else "an empty object"
    return f"a value of type {type(value).__name__}"
