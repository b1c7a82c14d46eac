"""Preference files: every layout reads to the same pairs, and every malformed one is refused with its place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qkernels.data import DataError, Message, Preference, as_preferences, read_preferences

QUESTION, BETTER, WORSE = "Where is Lima?", "In Peru.", "In Spain."
EXPECTED = Preference((Message("user", QUESTION),), BETTER, WORSE)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


LAYOUTS = {
    "strings": {"prompt": QUESTION, "chosen": BETTER, "rejected": WORSE},
    "messages": {"prompt": [user(QUESTION)], "chosen": [assistant(BETTER)], "rejected": [assistant(WORSE)]},
    "prompt as messages, answers as strings": {"prompt": [user(QUESTION)], "chosen": BETTER, "rejected": WORSE},
    "prompt as a string, answers as messages": {
        "prompt": QUESTION,
        "chosen": [assistant(BETTER)],
        "rejected": [assistant(WORSE)],
    },
    "whole conversations": {
        "chosen": [user(QUESTION), assistant(BETTER)],
        "rejected": [user(QUESTION), assistant(WORSE)],
    },
    "whole conversations and the prompt": {
        "prompt": [user(QUESTION)],
        "chosen": [user(QUESTION), assistant(BETTER)],
        "rejected": [user(QUESTION), assistant(WORSE)],
    },
    "whole conversations and the prompt as a string": {
        "prompt": QUESTION,
        "chosen": [user(QUESTION), assistant(BETTER)],
        "rejected": [user(QUESTION), assistant(WORSE)],
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": BETTER},
        "rejected": {"from": "gpt", "value": WORSE},
    },
}


def write(path: Path, *records: object, lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(list(records))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("record", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_every_layout_reads_to_the_same_pair(tmp_path: Path, record: object, lines: bool) -> None:
    path = write(tmp_path / ("pairs.jsonl" if lines else "pairs.json"), record, lines=lines)
    assert read_preferences(path) == ([EXPECTED], ())


def test_earlier_turns_and_system_messages_are_kept(tmp_path: Path) -> None:
    before = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user(QUESTION)]
    record = {"chosen": [*before, assistant(BETTER)], "rejected": [*before, assistant(WORSE)]}
    (pair,), _ = read_preferences(write(tmp_path / "a.json", record))
    assert [tuple(message) for message in pair.prompt] == [(m["role"], m["content"]) for m in before]
    record = {**LAYOUTS["ShareGPT"], "system": "Be brief."}
    (pair,), _ = read_preferences(write(tmp_path / "b.json", record))
    assert pair.prompt == (Message("system", "Be brief."), *EXPECTED.prompt)


def test_layouts_may_be_mixed_and_other_fields_are_named(tmp_path: Path) -> None:
    records = [{**record, "score": 1, "id": i} for i, record in enumerate(LAYOUTS.values())]
    pairs, ignored = read_preferences(write(tmp_path / "pairs.jsonl", *records, lines=True))
    assert pairs == [EXPECTED] * len(LAYOUTS)
    assert ignored == ("id", "score")


def test_blank_lines_a_byte_order_mark_and_a_misleading_ending_do_no_harm(tmp_path: Path) -> None:
    line = json.dumps(LAYOUTS["strings"])
    for name, text in (
        ("a.jsonl", f"\ufeff{line}\r\n\r\n{line}\r\n"),
        ("a.json", f"{line}\n{line}\n"),
        ("a.txt", f"{line}\n{line}\n"),
        ("b.txt", f"[{line},\n{line}]"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert read_preferences(tmp_path / name).pairs == [EXPECTED] * 2, name


GOOD = LAYOUTS["strings"]
BAD_RECORDS = {
    "not an object": ([1, 2], "expected an object .* found a list of 2"),
    "no chosen": ({"prompt": "a", "rejected": "b"}, "expected the field 'chosen', found only 'prompt', 'rejected'"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "expected the field 'prompt'"),
    "empty prompt": ({**GOOD, "prompt": " "}, "expected a prompt, found only an empty one"),
    "null prompt": ({**GOOD, "prompt": None}, "expected the field 'prompt'"),
    "number": ({**GOOD, "chosen": 5}, "expected 'chosen' to be a string, .* found the number 5"),
    "empty answer": ({**GOOD, "rejected": "  \n"}, "expected an answer in 'rejected', found only an empty one"),
    "identical": ({**GOOD, "rejected": BETTER}, "expected two different answers, found .* identical"),
    "empty list": (
        {**GOOD, "chosen": []},
        "expected 'chosen' to end with a message from the assistant, found no message",
    ),
    "ends with the user": (
        {"chosen": [user("a")], "rejected": [user("b")]},
        "expected 'chosen' to end with a message from the assistant, found one from 'user'",
    ),
    "unknown role": ({**GOOD, "prompt": [{"role": "boss", "content": "a"}]}, r"prompt\[0\].role .* found 'boss'"),
    "content is a list": ({**GOOD, "prompt": [{"role": "user", "content": []}]}, r"prompt\[0\].content.*an empty list"),
    "a message without content": ({**GOOD, "prompt": [{"role": "user"}]}, r"'prompt\[0\]' .*'content'.* found 'role'"),
    "a message that is a string": ({**GOOD, "prompt": ["a"]}, r"expected 'prompt\[0\]' to be a message, found 'a'"),
    "conversations that part early": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "they part at message 1",
    ),
    "another prompt than the conversation's": (
        {**LAYOUTS["whole conversations and the prompt as a string"], "prompt": "Something else"},
        "expected the conversation in 'chosen' to contain 'prompt'",
    ),
    "two prompts": ({**LAYOUTS["ShareGPT"], "prompt": "a"}, "either 'prompt' or 'conversations', found both"),
    "half of a surrogate pair": ({**GOOD, "chosen": "\ud83d"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_bad_record_is_refused_with_its_place(tmp_path: Path, record: object, message: str) -> None:
    for name, lines, place in (("p.json", False, "record 3"), ("p.jsonl", True, "line 3")):
        path = write(tmp_path / name, GOOD, GOOD, record, lines=lines)
        with pytest.raises(DataError, match=message) as caught:
            read_preferences(path)
        assert str(caught.value).startswith(f"{path}, {place}: ")
        assert "\n" not in str(caught.value)


BAD_FILES = {
    "empty.json": (b"", "the file is empty"),
    "blank.jsonl": (b" \n\n", "the file is empty"),
    "syntax.json": (b'[\n{"prompt": "a",\n "chosen" "b"}]', r"line 3, column 11: not valid JSON"),
    "syntax.jsonl": (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": \n', "line 3, column"),
    "cut.json": (b'[{"prompt": "a"', "line 1, column 16: not valid JSON"),
    "latin.json": ('[{"prompt":\n"é"}]'.encode("latin-1"), "line 2: expected UTF-8 text, found byte 0xe9"),
    "utf16.json": ("[]".encode("utf-16"), "line 1: expected UTF-8 text, found byte 0xff"),
    "p.parquet": (b"PAR1\x15\x04", "expected JSON or JSON lines, found a Parquet file; convert it first"),
    "p.arrow": (b"ARROW1\0\0", "found an Arrow file"),
    "p.jsonl.gz": (b"\x1f\x8b\x08", "found a file compressed with gzip"),
    "object.json": (b'{"data": []}', "expected an array of records, found an object with the fields 'data'"),
    "number.json": (b"17", "expected an array of records, found the number 17"),
    "none.json": (b"[]", "expected at least 1 preference pair, found 0"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "deep.jsonl": (b"[" * 100_000, "line 1: nested too deeply"),
    "digits.jsonl": (b"9" * 5000, "line 1: "),
    "pretty.jsonl": (b'[\n{"prompt": "a"}\n]', "line 1, column 2: not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(str(path))


def test_a_path_is_no_record(tmp_path: Path) -> None:
    for path in ("f.json", tmp_path / "f.json"):
        with pytest.raises(TypeError, match=r"got the path '.*f\.json': read_preferences\(path\)\.pairs reads it"):
            as_preferences(path)


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_preferences(tmp_path / "absent.json")
    with pytest.raises(DataError, match="found a folder"):
        read_preferences(tmp_path)
    secret = write(tmp_path / "secret.json", GOOD)
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root reads everything
        with pytest.raises(DataError, match="cannot be read"):
            read_preferences(secret)


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "few.json", GOOD, GOOD)
    assert len(read_preferences(path, minimum=2).pairs) == 2
    with pytest.raises(DataError, match="expected at least 3 preference pairs, found 2"):
        read_preferences(path, minimum=3)
