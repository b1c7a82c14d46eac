"""Preference data: every layout and kind of source reads to the same pairs; what is malformed is refused with its
place, or left out and counted."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import math
import os
import tracemalloc
from pathlib import Path

import pytest

from qkernels.data import DataError, Message, Preference, as_preferences, open_preferences, read_preferences

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
    "messages and answers": {"messages": [user(QUESTION)], "chosen": assistant(BETTER), "rejected": assistant(WORSE)},
    "messages that are the chosen conversation": {
        "messages": [user(QUESTION), assistant(BETTER)],
        "chosen": [user(QUESTION), assistant(BETTER)],
        "rejected": [user(QUESTION), assistant(WORSE)],
    },
    "HH-RLHF": {
        "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {BETTER}",
        "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {WORSE}",
    },
    "Alpaca": {"instruction": QUESTION, "input": "", "chosen": BETTER, "rejected": WORSE},
    "Alpaca, both answers in one field": {"instruction": QUESTION, "input": None, "output": [BETTER, WORSE]},
    "question and answers": {"system": "", "question": QUESTION, "chosen": BETTER, "rejected": WORSE},
    "response_j and response_k": {"question": QUESTION, "response_j": BETTER, "response_k": WORSE},
    "named responses": {"instruction": QUESTION, "chosen_response": BETTER, "rejected_response": WORSE},
    "numbered responses": {"prompt": QUESTION, "response_0": WORSE, "response_1": BETTER, "better_response_id": 1},
    "UltraFeedback as collected": {
        "instruction": QUESTION,
        "completions": [
            {"response": "Near Quito.", "overall_score": 4},
            {"response": BETTER, "overall_score": 7.5},
            {"response": WORSE, "overall_score": 1.0},
        ],
    },
    "a content of parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        "chosen": BETTER,
        "rejected": WORSE,
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
    assert [message.fields() for message in pair.prompt] == before
    system = {"role": "system", "content": "Be brief."}
    for record in (LAYOUTS["ShareGPT"], {**GOOD, "prompt": [system, user(QUESTION)]}):  # a field may repeat a message
        (pair,), _ = read_preferences(write(tmp_path / "b.json", {**record, "system": "Be brief."}))
        assert pair.prompt == (Message("system", "Be brief."), *EXPECTED.prompt)


@pytest.mark.parametrize("better", [1, 1.0, True, "1", "1.0", "True"])
def test_ids_of_the_better_response_come_in_several_types(better: object) -> None:
    record = {**LAYOUTS["numbered responses"], "better_response_id": better}
    assert as_preferences([record]) == [EXPECTED]


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
    alone = tmp_path / "alone.json"  # one record, of a layout without "chosen"
    alone.write_text(json.dumps(LAYOUTS["response_j and response_k"]) + "\n")
    assert read_preferences(alone).pairs == [EXPECTED]


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
    "names with a slip": (
        {"prompt": "a", "choosen": "b", "rejected": "c"},
        r"expected the field 'chosen', found only 'prompt', 'choosen', 'rejected' \(perhaps 'chosen' for 'choosen'\);"
        " known are: .*response_j",
    ),
    "completions of one score": (
        {"instruction": "a", "completions": [{"response": r, "overall_score": 5} for r in "bc"]},
        "expected 'completions' with different overall scores",
    ),
    "completions without an order": (
        {"instruction": "a", "completions": [{"response": str(s), "overall_score": s} for s in (9.0, math.nan, 1.0)]},
        "expected 'completions' with finite overall scores, found the number nan",
    ),
    "an id that is neither": (
        {**LAYOUTS["numbered responses"], "better_response_id": 0.5},
        "expected 'better_response_id' to be 0 or 1, found the number 0.5",
    ),
    "two system messages": (
        {**GOOD, "prompt": [{"role": "system", "content": "Rhyme."}, user(QUESTION)], "system": "Be brief."},
        "expected one system message, found 'system' and a different one",
    ),
    "a picture": (
        {**GOOD, "prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "to be text, found content of type image",
    ),
    "tools that are no list": ({**GOOD, "tools": "get_weather"}, "expected 'tools' to be a list of tools"),
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
    "p.parquet": (b"PAR1\x15\x04", "cannot be read as a Parquet file"),
    "p.arrow": (b"ARROW1\0\0", "cannot be read as an Arrow file"),
    "p.jsonl.gz": (b"\x1f\x8b\x08", "damaged gzip file"),
    "p.zip": (b"PK\x03\x04", "expected JSON, JSON lines, CSV, Parquet or Arrow, found a zip archive; unpack it first"),
    "ragged.csv": (b"prompt,chosen,rejected\na,b\n", "line 2: expected 3 cells, as in the header, found fewer"),
    "latin.csv": ("prompt\né".encode("latin-1"), "expected UTF-8 text, found byte 0xe9"),
    "columns.csv": (b"question,answer\na,b\n", "line 2: expected the field 'chosen', found only 'question', 'answer'"),
    "object.json": (b'{"data": []}', "record 1: expected the field 'chosen', found only 'data'"),
    "number.json": (b"17", "expected an array of records, found the number 17"),
    "none.json": (b"[]", "there is no record in it"),
    "header.csv": (b"prompt,chosen,rejected\n", "there is no record in it"),
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
    with pytest.raises(DataError, match=r"expected a folder with data .* found an empty folder"):
        read_preferences(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected a folder with data .* found 'notes\.txt'"):
        read_preferences(tmp_path)
    with pytest.raises(DataError, match="a file has no splits, and the split 'test' was asked for"):
        read_preferences(write(tmp_path / "a.json", GOOD), split="test")
    pipe, end = os.pipe()
    os.close(end)
    with pytest.raises(DataError, match="expected a file, found a pipe or a device"):
        read_preferences(f"/dev/fd/{pipe}")
    os.close(pipe)
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


# --- other sources ----------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"{QUESTION} {i}", "chosen": BETTER, "rejected": WORSE, "id": i} for i in range(600)]
CHATS = [
    {"chosen": [user(row["prompt"]), assistant(BETTER)], "rejected": [user(row["prompt"]), assistant(WORSE)]}
    for row in ROWS[:3]
]
PAIRS = as_preferences(ROWS)


def as_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def as_feather(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def as_gzip(path: Path, rows: list[dict]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


WRITERS = {
    "a.csv": as_csv,
    "a.tsv": as_csv,
    "a.parquet": as_parquet,
    "parquet_with_another_name": as_parquet,
    "a.arrow": as_feather,
    "a.jsonl.gz": as_gzip,
    "a.gz": as_gzip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_reads_to_the_same_pairs(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    WRITERS[name](tmp_path / name, ROWS)
    assert read_preferences(tmp_path / name) == (PAIRS, ("id",))
    WRITERS[name](tmp_path / name, [{**ROWS[0], "rejected": BETTER}])
    with pytest.raises(DataError, match=r", (line|row) [12]: expected two different answers"):
        read_preferences(tmp_path / name)


CELLS = {
    "JSON": json.dumps,
    "indented JSON": lambda value: json.dumps(value, indent=1),
    "JSON with spaces": lambda value: json.dumps(value).replace("[", " [ "),
    "as pandas writes it": str,
}


@pytest.mark.parametrize("write_cell", CELLS.values(), ids=CELLS)
def test_a_cell_of_a_csv_file_may_hold_messages(tmp_path: Path, write_cell) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    rows = [{**row, "tools": tools} for row in CHATS]
    as_csv(tmp_path / "a.csv", [{name: write_cell(value) for name, value in row.items()} for row in rows])
    assert read_preferences(tmp_path / "a.csv").pairs == as_preferences(rows)


@pytest.mark.parametrize(
    "text", ["[{", '{"type": "object"}', '[{"type": "text", "text": "a"}]', '{"from": "a", "to": "b"}', "[ {} ]"]
)
def test_a_text_of_a_csv_file_may_be_json(tmp_path: Path, text: str) -> None:
    as_csv(tmp_path / "a.csv", [{**GOOD, "prompt": text, "chosen": text}])
    (pair,), _ = read_preferences(tmp_path / "a.csv")
    assert pair.prompt[0].content == pair.chosen == text


def test_csv_files_read_in_turn_have_one_limit_for_their_cells(tmp_path: Path) -> None:
    as_csv(tmp_path / "short.csv", [GOOD])
    as_csv(tmp_path / "long.csv", [GOOD, {**GOOD, "rejected": "x" * 200_000}])  # csv stops at 131072 by itself
    short, long = (iter(open_preferences(tmp_path / name)) for name in ("short.csv", "long.csv"))
    assert next(short) == next(long) == EXPECTED
    assert not list(short)
    assert len(next(long).rejected) == 200_000


def test_text_of_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    ends = pa.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    column = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"prompt": ["a"], "chosen": column, "rejected": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as a Parquet file .*0xff"):
        read_preferences(tmp_path / "a.parquet")


def test_folders_of_files_and_their_splits(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("x")
    (folder / "data/_SUCCESS").write_text("")
    as_parquet(folder / "data/train-00001-of-00002.parquet", ROWS[400:])
    as_parquet(folder / "data/train-00000-of-00002.parquet", ROWS[:400])
    assert read_preferences(folder).pairs == PAIRS
    as_parquet(folder / "data/test_prefs-00000-of-00001.parquet", ROWS[:7])
    assert read_preferences(folder).pairs == PAIRS  # the one called train
    assert read_preferences(folder, split="test_prefs").pairs == PAIRS[:7]
    with pytest.raises(DataError, match="expected the split 'dev', found 'test_prefs', 'train'"):
        read_preferences(folder, split="dev")
    (folder / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        read_preferences(folder)
    lines = tmp_path / "lines"
    (lines / "helpful").mkdir(parents=True)
    as_gzip(lines / "helpful/train.jsonl.gz", ROWS[:5])
    as_gzip(lines / "helpful/validation.jsonl.gz", ROWS[5:6])
    assert read_preferences(lines, split="validation").pairs == PAIRS[5:6]
    assert len(read_preferences(lines).pairs) == 5


def test_splits_none_of_which_is_called_train_have_to_be_named(tmp_path: Path) -> None:
    for name in ("test", "dev"):
        write(tmp_path / f"{name}.jsonl", GOOD, lines=True)
    with pytest.raises(DataError, match="expected one split, or one called 'train', found 'test', 'validation'"):
        read_preferences(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_what_datasets_saves_is_read_without_it(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert read_preferences(tmp_path / "one").pairs == PAIRS
    with pytest.raises(DataError, match="the data set has no splits"):
        read_preferences(tmp_path / "one", split="train")
    chosen = rows.select([5, 3])  # rows that are not in the order of the table
    datasets.DatasetDict({"a": chosen, "b": rows.select(range(4))}).save_to_disk(tmp_path / "many")
    assert read_preferences(tmp_path / "many", split="a").pairs == [PAIRS[5], PAIRS[3]]
    with pytest.raises(DataError, match="expected one split, or one called 'train', found 'a', 'b'"):
        read_preferences(tmp_path / "many")
    datasets.Dataset.from_list(CHATS).save_to_disk(tmp_path / "chats")
    assert read_preferences(tmp_path / "chats").pairs == PAIRS[:3]
    assert as_preferences(datasets.load_from_disk(tmp_path / "chats")) == PAIRS[:3]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_columns_of_json_are_decoded(tmp_path: Path) -> None:
    import datasets

    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no columns of JSON")
    record = trajectory()
    features = datasets.Features({name: datasets.List(datasets.Json()) for name in record})
    datasets.Dataset.from_list([record], features=features).save_to_disk(tmp_path / "json")
    assert read_preferences(tmp_path / "json").pairs == as_preferences([record])


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_a_name_on_the_hub_goes_to_datasets(tmp_path: Path, monkeypatch) -> None:
    import datasets

    asked = []

    def load(name, config=None, split=None):
        asked.append((name, config, split))
        both = datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:3])}
        )
        return both if split is None else both[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(open_preferences("owner/pairs")) == PAIRS[:2]
    assert list(open_preferences(Path("owner/pairs"), split="test", config="en")) == PAIRS[2:3]
    assert asked == [("owner/pairs", None, None), ("owner/pairs", "en", "test")]
    for path in ("pairs", "./owner/pairs", "owner/pairs.jsonl", str(tmp_path / "pairs")):
        with pytest.raises(DataError, match="no such file"):
            read_preferences(path)
    assert len(asked) == 2


# --- trajectories -----------------------------------------------------------------------------------------------------


def trajectory() -> dict:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}],
    }
    start = [user("How warm is it?")]
    return {
        "chosen": [*start, call, {"role": "tool", "content": "20", "name": "look"}, assistant("It is 20.")],
        "rejected": [
            *start,
            call,
            {"role": "tool", "content": "20", "name": "look"},
            assistant("Cold."),
            user("Sure?"),
            assistant("No."),
        ],
    }


def test_answers_of_several_turns_are_trajectories() -> None:
    (pair,) = as_preferences([trajectory()])
    assert [message.role for message in pair.prompt] == ["user", "assistant", "tool"]  # what both sides share
    assert pair.prompt[1].fields()["tool_calls"] == [
        {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
    ]
    assert [m.role for m in pair.turns("chosen")] == ["assistant"] and pair.chosen == "It is 20."
    assert [m.role for m in pair.turns("rejected")] == ["assistant", "user", "assistant"]
    assert pair.rejected == "Cold.\n\nNo."
    record = trajectory()
    record["chosen"][2] = {"role": "tool", "content": "25"}
    (pair,) = as_preferences([{**record, "tools": [{"type": "function"}]}])
    # They part at what the tool said, so the call before it begins the answers.
    assert [m.role for m in pair.prompt] == ["user"]
    assert [m.role for m in pair.turns("chosen")] == [
        "assistant",
        "tool",
        "assistant",
    ] and pair.chosen == "\n\nIt is 20."
    assert json.loads(pair.tools) == [{"type": "function"}]
    again = as_preferences([pair.as_messages()])
    assert again == [pair]


def test_answers_may_go_on_where_the_prompt_ends() -> None:
    turns = trajectory()
    whole = as_preferences([turns])
    record = {"prompt": turns["chosen"][:1], "chosen": turns["chosen"][1:], "rejected": turns["rejected"][1:]}
    assert as_preferences([record]) == whole
    record["prompt"] = "How warm is it?"
    assert as_preferences([record]) == whole


def test_calls_of_tools_in_sharegpt() -> None:
    def say(who: str, text: str) -> dict:
        return {"from": who, "value": text}

    call = '{"name": "add", "arguments": {"a": 1}}'
    record = {
        "conversations": [say("human", "Sum?"), say("function_call", call), say("observation", "3")],
        "chosen": say("gpt", "3"),
        "rejected": say("gpt", "4"),
    }  # fmt: skip
    (pair,) = as_preferences([record])
    assert [m.role for m in pair.prompt] == ["user", "assistant", "tool"]
    assert pair.prompt[1].fields()["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    record["conversations"][1]["value"] = "add 1"
    with pytest.raises(DataError, match=r"expected 'conversations\[1\]' to hold tool calls as JSON"):
        as_preferences([record])


def test_history_and_input_of_alpaca_make_the_prompt() -> None:
    record = {"instruction": "Add.", "input": "1 and 2", "history": [["Hi", "Hello"]], "chosen": "3", "rejected": "4"}
    (pair,) = as_preferences([record])
    assert [tuple(m[:2]) for m in pair.prompt] == [("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n1 and 2")]


# --- records that are left out, and memory ----------------------------------------------------------------------------


def test_invalid_records_are_left_out_and_counted(tmp_path: Path) -> None:
    bad = {**GOOD, "rejected": BETTER}
    path = write(tmp_path / "a.jsonl", bad, GOOD, {**GOOD, "chosen": " "}, bad, GOOD, lines=True)
    data = open_preferences(path, skip_invalid=True)
    for _ in range(2):  # each time the same
        assert list(data.numbered()) == [(1, EXPECTED), (4, EXPECTED)]
        assert sum(data.skipped.values()) == 3
    assert data.skipped_line() == (
        "left out 3 records: 2 x expected two different answers; 1 x expected an answer in 'chosen'"
    )
    with pytest.raises(DataError, match="line 1: expected two different answers"):
        list(open_preferences(path))
    with pytest.raises(DataError, match="there is no record in it"):
        list(open_preferences(write(tmp_path / "none.json")))
    with pytest.raises(DataError, match="no record can be used; left out 1 record: 1 x expected two different"):
        list(open_preferences(write(tmp_path / "b.json", bad), skip_invalid=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    rows = [{**row, "rejected": "x" * 1000} for row in ROWS]

    def peak(count: int) -> int:
        path = tmp_path / f"{count}{name}"
        if name.endswith("parquet"):
            as_parquet(path, rows * count)
        else:
            write(path, *rows * count, lines=True)
        data = open_preferences(path)
        tracemalloc.start()
        try:
            assert sum(1 for _ in data) == count * len(rows)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # what is imported and cached once
    assert peak(4) < 2 * peak(1)  # 4 times as many pairs, of 1 kB each
