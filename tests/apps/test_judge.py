"""`qkernels judge`: verdicts in both orders become a win rate with an interval, and length is taken out of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("filelock")

from qkernels.cli import main
from qkernels.intervals import Interval, bootstrap, bootstrap_mean, unseen, wilson
from qkernels.judge import JudgeError, JudgeOptions, ModelJudge, Verdict, run, run_judge, win_rate
from qkernels.judge.answers import Generator, Prompt, read_answers, read_prompts, text_of
from qkernels.judge.statistics import _fit
from qkernels.records.pairs import DataError, Message
from score_runs import folders, models  # noqa: F401  fixtures

# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_mean_has_the_width_of_its_standard_error():
    r = random.Random(0)
    values = [float(r.random() < 0.3) for _ in range(400)]
    mean = sum(values) / 400
    error = math.sqrt(mean * (1 - mean) / 400)
    found = bootstrap_mean(values, bounds=(0, 1), resamples=4000)
    assert found.estimate == mean
    # A quantile of 4000 draws errs by sqrt(.025 * .975 / 4000) / density = .04 standard errors; 4 of these, and 1/400.
    for end, expected in ((found.low, mean - 1.96 * error), (found.high, mean + 1.96 * error)):
        assert abs(end - expected) < 0.17 * error + 1 / 400
    assert found == bootstrap_mean(values, bounds=(0, 1), resamples=4000), "the same seed"
    assert found.low != bootstrap_mean(values, resamples=4000, seed=1).low or found.high != found.low
    narrow = bootstrap_mean(values, level=0.5)
    assert narrow.high - narrow.low < 0.5 * (found.high - found.low)


def test_intervals_cover_as_often_as_they_say():
    """300 samples of 40 coins: the number that cover is binomial, 4 standard deviations either way."""
    r = random.Random(1)
    covered = {"bootstrap": 0, "wilson": 0}
    for _ in range(300):
        values = [float(r.random() < 0.4) for _ in range(40)]
        found = bootstrap_mean(values, bounds=(0, 1), resamples=400, level=0.9)
        covered["bootstrap"] += found.low <= 0.4 <= found.high
        found = wilson(sum(values) / 40, 40, 0.9)
        covered["wilson"] += found.low <= 0.4 <= found.high
    for name, count in covered.items():
        assert abs(count / 300 - 0.9) < 4 * math.sqrt(0.09 / 300), name


def test_equal_values_have_an_interval_all_the_same():
    found = bootstrap_mean([1.0] * 10, bounds=(0, 1))
    assert (found.estimate, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.05**0.1)  # 10 of 10: the lower bound p with p^10 = 0.05
    assert unseen(0.5, (0, 1), 10) == pytest.approx((0.5, 0.5 * 0.05**0.1, 1 - 0.5 * 0.05**0.1, 0.95))
    assert bootstrap_mean([0.0], bounds=(0, 1)).high == pytest.approx(0.95)
    assert bootstrap_mean([2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 0.95), "without bounds nothing is known of the others"


def test_wilson_is_the_published_formula():
    found = wilson(0.8, 50)  # solves |p - 0.8| = z sqrt(p (1 - p) / 50)
    for p in found[1:3]:
        assert abs(p - 0.8) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 50), rel=1e-6)
    assert wilson(1.0, 5).high == 1.0 and 0.5 < wilson(1.0, 5).low < 0.6


def test_wrong_numbers_are_refused():
    for call, message in (
        (lambda: bootstrap_mean([]), "at least one"),
        (lambda: bootstrap_mean([math.nan]), "finite"),
        (lambda: bootstrap_mean([2.0], bounds=(0, 1)), r"lie in \[0, 1\]"),
        (lambda: bootstrap_mean([1.0], level=1.0), "level"),
        (lambda: bootstrap(lambda w: w[:, 0], 0), "units"),
        (lambda: bootstrap(lambda w: w[:, 0], 3, resamples=0), "resamples"),
        (lambda: wilson(1.2, 3), "share"),
        (lambda: wilson(0.2, 0), "units"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- win rates --------------------------------------------------------------------------------------------------------


def test_a_win_rate_counts_ties_and_contradictions_as_halves():
    rate = win_rate([Verdict(1, 1), Verdict(1, 0), Verdict(0.5, 0.5), Verdict(0, 0), Verdict(1, None)])
    assert rate.win_rate.estimate == pytest.approx((1 + 0.5 + 0.5 + 0 + 1) / 5)
    assert (rate.wins, rate.ties, rate.losses, rate.both_orders) == (2, 2, 1, 4)
    assert rate.agreement.estimate == pytest.approx(3 / 4)
    # With A's answer first it wins (1 + 1 + .5 + 0) / 4; with B's first, B's answer does (0 + 1 + .5 + 1) / 4.
    assert rate.first_wins.estimate == pytest.approx((2.5 + 2.5) / 8)
    assert rate.win_rate.low < rate.win_rate.estimate < rate.win_rate.high
    for interval in (rate.win_rate, rate.agreement, rate.first_wins, rate.length_controlled):
        assert interval is not None and 0 <= interval.low <= interval.high <= 1


def test_a_judge_that_takes_the_first_answer_says_nothing():
    rate = win_rate([Verdict(1, 0)] * 30)
    assert rate.win_rate.estimate == 0.5 and rate.first_wins.estimate == 1.0 and rate.agreement.estimate == 0.0
    assert rate.win_rate.low < 0.5 < rate.win_rate.high, "an interval also where all prompts agree"


def _by_length(theta: float, phi: float, count: int = 4000) -> list[Verdict]:
    """Verdicts with chance sigma(theta + phi tanh(d / s)), A's answers being longer on average."""
    r = random.Random(3)
    lengths = [(round(400 + 150 * r.gauss(0, 1)), round(300 + 150 * r.gauss(0, 1))) for _ in range(count)]
    differences = torch.tensor([float(a - b) for a, b in lengths])
    chance = torch.sigmoid(theta + phi * torch.tanh(differences / differences.std(correction=0))).tolist()
    return [Verdict(w, w, a, b) for (a, b), p in zip(lengths, chance, strict=True) for w in [float(r.random() < p)]]


def test_length_is_taken_out():
    """The regression finds the chance at equal length; the plain win rate does not."""
    rate = win_rate(_by_length(-0.4, 1.5), resamples=300)
    truth = 1 / (1 + math.exp(0.4))
    low, high = rate.length_controlled[1:3]
    # A standard error is a quarter of the interval's width; 4 of them.
    assert abs(rate.length_controlled.estimate - truth) < high - low
    assert low < truth + (high - low) / 2 and high - low < 0.06
    assert rate.win_rate.low > truth + 0.05, "length wins where the model does not"
    assert abs(math.log(rate.length_effect.estimate) - 1.5) < 0.4
    plain = win_rate(_by_length(-0.4, 0.0), resamples=300)
    assert abs(plain.length_controlled.estimate - plain.win_rate.estimate) < 0.02


def test_the_regression_is_the_maximum_of_its_likelihood():
    verdicts = _by_length(0.3, -1.0, 200)
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    y = torch.tensor([v.wins for v in verdicts], dtype=torch.float64)
    weights = torch.stack([torch.ones(200), torch.arange(200) % 3]).double()
    theta, phi = _fit(x, y, weights)
    for row in range(2):
        t, f = theta[row].clone().requires_grad_(), phi[row].clone().requires_grad_()
        z = t + f * x
        loss = -(weights[row] * (y * torch.nn.functional.logsigmoid(z) + (1 - y) * torch.nn.functional.logsigmoid(-z)))
        (loss.sum() + 0.05 * f * f).backward()
        assert abs(t.grad) < 1e-6 and abs(f.grad) < 1e-6


def test_what_length_cannot_tell():
    same = win_rate([Verdict(1, 1, 5, 5), Verdict(0, 0, 7, 7), Verdict(1, 1, 9, 9)])
    assert same.length_controlled == same.win_rate and "equally long" in same.length_note
    constant = win_rate([Verdict(1, 1, 15, 5), Verdict(0, 0, 17, 7)])
    assert constant.length_controlled is None and "+10 characters longer" in constant.length_note
    longer = win_rate([Verdict(w, w, 10 + i, 5) for i, w in enumerate((1, 0, 1, 1, 0, 1))])
    assert longer.length_controlled is not None and "extrapolation" in longer.length_note
    always = win_rate([Verdict(1, 1, 10 + i, 5) for i in range(6)])
    assert always.length_controlled.estimate == 1.0 and always.length_controlled.low == pytest.approx(0.05 ** (1 / 6))
    separated = win_rate([Verdict(w, w, 100 * w, 50) for w in (1, 0, 1, 0, 1, 1)])  # the longer one always wins
    assert 0 <= separated.length_controlled.low <= separated.length_controlled.high <= 1
    for bad in ([], [Verdict(None, None)], [Verdict(2, 1)]):
        with pytest.raises(ValueError, match="verdict"):
            win_rate(bad)


# --- the command ------------------------------------------------------------------------------------------------------


def judge(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(["judge", *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def sides(tmp_path: Path) -> Path:
    """Two files of answers to six prompts: A counts upwards in words, B is longer and says little."""
    prompts = [f"Count to {i}." for i in range(1, 7)]
    write(tmp_path / "a.jsonl", [{"prompt": p, "answer": "one two three four five six"[: 3 + 3 * i]}
                                 for i, p in enumerate(prompts)])  # fmt: skip
    write(tmp_path / "b.jsonl", [{"instruction": p, "output": "well, " * (2 + i)} for i, p in enumerate(prompts)][::-1])
    (tmp_path / "scorers.py").write_text(
        "calls = []\n"
        "def numbers(prompt, answer):\n    return sum(answer.count(w) for w in ('one', 'two', 'three'))\n"
        "def longer(prompt, first, second):\n"
        "    calls.append((first, second))\n"
        "    return 'first' if len(first) > len(second) else 'second'\n"
        "def first(prompt, a, b):\n    return 1\n"
        "def half(prompt, a, b, strict=False):\n    return 0.5\n"
        "def bad(prompt, answer):\n    return float('nan')\n"
        "def fails(prompt, answer):\n    raise KeyError('no such \\x1b[31m key')\n"
        "def alone(answer):\n    return 1\n"
        "number = 3\n"
    )
    return tmp_path


def usual(sides: Path, *more: object) -> list[object]:
    return ["--a", sides / "a.jsonl", "--b", sides / "b.jsonl", "--out", sides / "out", "--resamples", 200, *more]


def test_a_scorer_of_one_answer(sides: Path):
    status, out, err = judge(*usual(sides, "--scorer", f"{sides}/scorers.py:numbers"))
    assert status == 0, err
    figures = json.loads((sides / "out/judge.json").read_text())
    assert figures["win_rate"]["estimate"] == 1.0 and figures["win_rate"]["low"] == pytest.approx(0.05 ** (1 / 6))
    assert figures["prompts"] == 6 and figures["wins"] == 6 and not figures["ordered"]
    assert figures["mean_b_score"]["estimate"] == 0 and figures["mean_a_score"]["low"] >= 1
    assert "A wins 100.0 % (95 % interval 60.7 to 100.0 %) of 6 prompts" in out and "orders" not in out
    page = (sides / "out/report.html").read_text(encoding="utf-8")
    assert "a.jsonl against B: b.jsonl on 6 prompts" in page and "Count to 3." in page and "A is better" in page
    lines = [json.loads(line) for line in (sides / "out/verdicts.jsonl").read_text().splitlines()]
    assert [line["order"] for line in lines] == ["each"] * 6 and lines[0]["b_score"] == 0


def test_answers_of_a_file_that_did_not_end_are_not_laid_to_this_runs_limit(sides: Path):
    rows = [json.loads(line) for line in (sides / "a.jsonl").read_text().splitlines()]
    write(sides / "a.jsonl", [{**row, "finished": i > 1} for i, row in enumerate(rows)])
    status, out, err = judge(*usual(sides, "--scorer", f"{sides}/scorers.py:numbers"))
    assert status == 0 and "2 of A are unfinished, as the files of answers say" in out, err
    assert "--max-new-tokens" not in out


def test_a_scorer_of_both_is_asked_in_both_orders(sides: Path, monkeypatch):
    monkeypatch.chdir(sides)
    status, out, err = judge(*usual(sides, "--scorer", "scorers:first"))
    assert status == 0, err
    assert "A wins 50.0 %" in out and "the first answer wins 100.0 %" in out and "holds 50 %" in out
    status, out, err = judge(*usual(sides, "--scorer", "scorers:longer", "--overwrite"))
    assert status == 0 and "A wins 0.0 %" in out and "agree on 100.0 %" in out, out
    import scorers

    assert len(scorers.calls) == 12 and {(b, a) for a, b in scorers.calls} == set(scorers.calls)
    assert judge(*usual(sides, "--scorer", "scorers:half", "--overwrite"))[1].count("(0 won, 6 tied, 0 lost)") == 1


def test_verdicts_made_elsewhere(sides: Path):
    status, out, err = judge(*usual(sides))
    assert status == 0 and "questions.jsonl" in out and "pass the file to --verdicts" in err
    rows = [json.loads(line) for line in (sides / "out/questions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[0]["first"] == rows[1]["second"] and rows[0]["first"] in rows[0]["question"]
    status, _, err = judge(*usual(sides, "--verdicts", sides / "out/questions.jsonl", "--overwrite"))
    assert status == 2 and "whose files --overwrite deletes" in err
    status, _, err = judge(*usual(sides, "--verdicts", sides / "out/questions.jsonl", "--resume"))
    assert status == 2 and "line 1: expected 'winner' to be one of" in err
    for row in rows:
        row["winner"] = "first" if row["number"] < 2 else "second" if row["order"] == "ba" else "first"
    filled = write(sides / "filled.jsonl", [{k: row[k] for k in ("prompt", "order", "winner")} for row in rows])
    status, out, err = judge(*usual(sides, "--verdicts", filled, "--resume"))
    assert status == 0 and "(4 won, 2 tied, 0 lost)" in out and "agree on 66.7 %" in out, out + err
    one = write(sides / "one.jsonl", [{"number": n, "winner": "ab"[n % 2]} for n in range(6)])
    status, out, err = judge(*usual(sides, "--verdicts", one, "--overwrite"))
    assert status == 0 and "(3 won, 0 tied, 3 lost)" in out and "one order alone was judged" in out, out + err
    write(one, [{"number": 0, "winner": "a"}])
    status, _, err = judge(*usual(sides, "--verdicts", one, "--overwrite"))
    assert status == 2 and "none on 5 of 6 prompts, the first is prompt 1: 'Count to 2.'" in err


def test_an_interrupted_comparison_goes_on(sides: Path, monkeypatch):
    monkeypatch.chdir(sides)
    (sides / "slow.py").write_text(
        "count = 0\n"
        "def f(prompt, first, second):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 6:\n        raise KeyboardInterrupt\n"
        "    return 0.75\n"
    )
    status, _, err = judge(*usual(sides, "--scorer", "slow:f"))
    assert status == 130 and "--resume goes on" in err
    with (sides / "out/verdicts.jsonl").open("a") as file:
        file.write('{"number": 2, "pro')  # struck in the middle of a line
    status, _, err = judge(*usual(sides, "--scorer", "slow:f"))
    assert status == 2 and "go on with --resume" in err
    status, _, err = judge(*usual(sides, "--scorer", "scorers:half", "--resume"))
    assert status == 2 and "judge was 'slow:f, " in err and "and is 'scorers:half, " in err
    status, _, err = judge(*usual(sides, "--scorer", "slow:f", "--resume"))
    import slow

    assert status == 0 and slow.count == 6 + 8, "two prompts of six were judged"
    figures = json.loads((sides / "out/judge.json").read_text())
    assert figures["win_rate"]["estimate"] == 0.5 and figures["first_wins"]["estimate"] == 0.75
    lines = (sides / "out/verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 12
    lines[0] = lines[0].replace("Count to 1.", "Count to 9.")
    (sides / "out/verdicts.jsonl").write_text("\n".join(lines) + "\n")
    status, _, err = judge(*usual(sides, "--scorer", "slow:f", "--resume"))
    assert status == 2 and "prompt 0 was another one" in err
    (sides / "out/verdicts.jsonl").write_text("[1]\n")
    status, _, err = judge(*usual(sides, "--scorer", "slow:f", "--resume"))
    assert status == 2 and "damaged" in err


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0c"])
def test_separators_in_texts_do_not_damage_the_folder(sides: Path, separator: str):
    for name, answer in (("a", "one"), ("b", "two")):
        write(sides / f"{name}.jsonl", [{"prompt": f"Count{separator}to 1.", "answer": answer + separator + "end"}])
    scorer = ["--scorer", f"{sides}/scorers.py:half"]
    for more in ([], ["--resume"], ["--resume"]):
        status, _, err = judge(*usual(sides, *scorer, *more))
        assert status == 0, err


def test_winners_that_somebody_gave_are_not_written_over(sides: Path):
    assert judge(*usual(sides))[0] == 0
    file = sides / "out/questions.jsonl"
    written = file.read_text()
    assert judge(*usual(sides, "--resume"))[0] == 0 and file.read_text() == written
    for filled in (written.replace('"winner": null', '"winner": "first"', 1), written[:-5]):
        file.write_text(filled)
        status, _, err = judge(*usual(sides, "--resume"))
        assert status == 2 and "somebody has given winners there" in err and file.read_text() == filled


def test_another_scorer_and_other_answers_are_told_from_what_was_judged(sides: Path):
    """By their contents: the name of a file says nothing of the function in it, nor a folder's of its answers."""
    (sides / "a").mkdir()
    (sides / "a.jsonl").rename(sides / "a/part.jsonl")
    where = ["--a", sides / "a", "--scorer", f"{sides}/scorers.py:numbers"]
    assert judge(*usual(sides, *where))[0] == 0
    rows = [json.loads(line) for line in (sides / "a/part.jsonl").read_text().splitlines()]
    write(sides / "a/part.jsonl", [{**row, "answer": "nothing"} for row in rows])
    status, _, err = judge(*usual(sides, *where, "--resume"))
    assert status == 2 and "--resume needs the settings that the run began with: a was" in err, err
    write(sides / "a/part.jsonl", rows)
    assert judge(*usual(sides, *where, "--resume"))[0] == 0
    scorers = sides / "scorers.py"
    scorers.write_text(scorers.read_text().replace("return sum", "return -sum"))
    status, _, err = judge(*usual(sides, *where, "--resume"))
    assert status == 2 and "judge was" in err, err


def test_prompts_of_the_usual_layouts(tmp_path: Path):
    rows = [
        {"instruction": "Translate", "input": "Hallo"},
        {"instruction": "Translate", "input": "Tag", "history": [["Hi", "Hello"]], "system": "Be brief."},
        {"instruction": "Translate", "input": "Welt", "chosen_response": "world", "rejected_response": "word"},
        {"messages": [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]},
        {"prompt": "Sing.", "chosen": "La", "rejected": "Lo"},
        {"question": "Why?", "system": ""},
    ]
    prompts, again = read_prompts(write(tmp_path / "prompts.jsonl", rows))
    assert again == 1, "the last message is the answer, not a part of the prompt"
    assert [text_of(prompt) for prompt in prompts] == [
        "Translate\nHallo",
        "system: Be brief.\n\nuser: Hi\n\nassistant: Hello\n\nuser: Translate\nTag",
        "Translate\nWelt",
        "Sing.",
        "Why?",
    ]
    answered = [{**row, "output": str(i)} for i, row in enumerate(rows[:2])]
    assert [answer.text for _, answer in read_answers(write(tmp_path / "a.jsonl", answered)).values()] == ["0", "1"]
    with pytest.raises(DataError, match="expected an object with a prompt and an answer, found a value of type str"):
        read_answers(write(tmp_path / "b.jsonl", ["hello", "there"]))


def test_verdicts_without_an_order(sides: Path):
    """They are one verdict each: nothing is known of what the other order would have brought."""
    verdicts = write(sides / "v.jsonl", [{"number": n, "order": "each", "winner": "ab"[n % 2]} for n in range(6)])
    status, out, err = judge(*usual(sides, "--verdicts", verdicts))
    assert status == 0 and "(3 won, 0 tied, 3 lost)" in out and "orders" not in out, out + err
    assert json.loads((sides / "out/judge.json").read_text())["ordered"] is False
    write(verdicts, [{"number": n, "order": order, "winner": "a"} for n in range(6) for order in ("each", "ab")])
    status, _, err = judge(*usual(sides, "--verdicts", verdicts, "--overwrite"))
    assert status == 2 and "line 2: expected verdicts with an order" in err and "found both" in err
    rows = [{"number": n, "winner": "a"} for n in range(6)]
    write(verdicts, [*rows, *({"prompt": f"Kount to {i}.", "order": "ba", "winner": "b"} for i in range(6))])
    status, _, err = judge(*usual(sides, "--verdicts", verdicts, "--overwrite"))
    assert status == 0 and "6 verdicts of" in err and "on other prompts" in err


def test_both_sides_answer_the_same_prompts(sides: Path):
    with (sides / "b.jsonl").open("a") as file:
        file.write('{"prompt": "Count to 7.", "answer": "no"}\n')
    scorer = ["--scorer", f"{sides}/scorers.py:numbers"]
    status, _, err = judge(*usual(sides, *scorer))
    assert status == 2 and "no answer to 1 of 7 prompts that --b" in err and "--prompts" in err
    prompts = write(sides / "prompts.jsonl", [f"Count to {i}." for i in range(1, 7)])
    assert judge(*usual(sides, *scorer, "--prompts", prompts))[0] == 0


def test_scorers_with_dataclasses_and_the_options_of_intervals(sides: Path):
    (sides / "typed.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Found:\n    value: int\n"
        "def f(prompt, answer):\n    return Found(len(answer)).value\n"
    )
    status, _, err = judge(*usual(sides, "--scorer", f"{sides}/typed.py:f", "--level", 0.5))
    assert status == 0, err
    figures = json.loads((sides / "out/judge.json").read_text())
    assert figures["mean_a_score"]["level"] == figures["win_rate"]["level"] == 0.5


def test_a_folder_that_was_struck_at_its_beginning_or_its_end(sides: Path):
    scorer = ["--scorer", f"{sides}/scorers.py:numbers"]
    for more in (["--resume"], ["--overwrite"]):
        (sides / "out").mkdir()
        (sides / "out/.lock").touch()
        status, _, err = judge(*usual(sides, *scorer, *more))
        assert status == 0, err
        shutil.rmtree(sides / "out")


def test_two_runs_at_once_do_not_share_a_folder(sides: Path, monkeypatch):
    """The second one has looked before the first one began, and has its turn when that is ready."""
    options = {"a": str(sides / "a.jsonl"), "b": str(sides / "b.jsonl"), "out": sides / "out", "resamples": 200}
    real, turns = run._prompts, []

    def prompts(given, progress):
        if not turns:
            turns.append(1)
            run_judge(JudgeOptions(**options, scorer=f"{sides}/scorers.py:numbers"), io.StringIO())
        return real(given, progress)

    monkeypatch.setattr(run, "_prompts", prompts)
    with pytest.raises(JudgeError, match="another run has written a comparison there meanwhile"):
        run_judge(JudgeOptions(**options, scorer=f"{sides}/scorers.py:longer"), io.StringIO())


def test_an_interrupted_overwrite_leaves_a_comparison(sides: Path, monkeypatch):
    scorer = ["--scorer", f"{sides}/scorers.py:numbers"]
    assert judge(*usual(sides, *scorer))[0] == 0
    real = Path.unlink

    def unlink(self, *arguments, **options):
        if self.name == "verdicts.jsonl":
            raise KeyboardInterrupt
        real(self, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(Path, "unlink", unlink)
        assert judge(*usual(sides, *scorer, "--overwrite"))[0] == 130
    assert judge(*usual(sides, *scorer, "--overwrite"))[0] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scorer", "scorers.py:numbers", "--judge", "x"], "not allowed with argument"),
        (["--scorer", "numbers"], "--scorer numbers: expected module:function"),
        (["--scorer", "absent.py:f"], "no such file"),
        (["--scorer", "no_such_module_here:f"], "cannot be imported (ModuleNotFoundError"),
        (["--scorer", "scorers.py:absent"], "has no function 'absent'"),
        (["--scorer", "scorers.py:number"], "has no function 'number'"),
        (["--scorer", "scorers.py:alone"], "found 1 arguments"),
        (["--scorer", "scorers.py:bad"], "prompt 0: expected a finite number, got nan"),
        (["--scorer", "scorers.py:fails"], "prompt 0: KeyError: 'no such \\x1b[31m key'"),
        (["--scorer", "scorers.py:numbers", "--a", "absent.jsonl"], "--a absent.jsonl: no such file or folder"),
        (["--scorer", "scorers.py:numbers", "--prompts", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--judge", "./absent"], "--judge ./absent: no such folder"),
        (["--template", "x.txt"], "--template is the question to --judge"),
        (["--resamples", "3"], "--resamples must be 100 or more, got 3"),
        (["--level", "1"], "--level must lie in [0.5, 1), got 1.0"),
        (["--temperature", "-1"], "--temperature must be finite and 0 or more, got -1.0"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--out", "a.jsonl"], "--out a.jsonl: exists and is not a folder"),
        (["--out", "a.jsonl/out"], "cannot be written"),
        (["--resume", "--overwrite"], "not allowed with argument"),
    ],
)
def test_bad_options_are_refused(sides: Path, monkeypatch, more: list[str], message: str):
    monkeypatch.chdir(sides)
    status, _, err = judge(*usual(sides, *more))
    assert status == 2 and message in err and "\x1b" not in err, err


def test_models_that_cannot_answer_or_judge_are_told_before_one_has_answered(sides: Path, folders: Path):  # noqa: F811
    """And before the folder is there: the same command, mended, is no second run."""
    scorer = ["--scorer", f"{sides}/scorers.py:numbers"]
    (sides / "bare").mkdir()
    (sides / "empty").mkdir()
    shutil.copy(folders / "policy/config.json", sides / "bare")
    prompts = write(sides / "prompts.jsonl", [{"prompt": "Count."}])
    for more, message in (
        (["--a", sides / "bare", "--prompts", prompts, *scorer], f"--a {sides / 'bare'}: the folder has no weights"),
        (["--a", sides / "empty", "--prompts", prompts, *scorer], f"--a {sides / 'empty'}: no model"),
        (["--a", folders / "policy", "--prompts", prompts, "--judge", sides / "bare"], "the folder has no weights"),
        (["--judge", sides / "empty"], f"--judge {sides / 'empty'}: the folder has no weights"),
    ):
        status, _, err = judge(*usual(sides, *more))
        assert status == 2 and message in err and "answers to generate" not in err, err
        assert not (sides / "out").exists()


def test_answers_that_do_not_match_are_told(sides: Path):
    scorer = ["--scorer", f"{sides}/scorers.py:numbers"]
    for rows, message in (
        ([{"prompt": "Count to 1.", "answer": "x"}], "no answer to 5 of 6 prompts, the first: 'Count to 2.'"),
        ([{"prompt": "Count to 1."}], "line 1: expected one of the fields 'answer'"),
        ([{"answer": "x"}], "line 1: expected one of the fields 'prompt'"),
        ([{"prompt": " ", "answer": "x"}], "found only an empty one"),
        (
            [{"prompt": "p", "answer": "x"}, {"prompt": "p", "answer": "y"}],
            "line 2: expected one answer to each prompt",
        ),
        ([], "the file is empty"),
    ):
        write(sides / "b.jsonl", rows)
        status, _, err = judge(*usual(sides, *scorer))
        assert status == 2 and message in err, err
    assert not (sides / "out").exists()


def test_strangers_files_are_spared(sides: Path):
    (sides / "out").mkdir()
    (sides / "out/thesis.tex").write_text("precious")
    scorer = ["--scorer", f"{sides}/scorers.py:numbers"]
    for more in ([], ["--overwrite"], ["--resume"]):
        status, _, err = judge(*usual(sides, *scorer, *more))
        assert status == 2 and "--out" in err
    (sides / "out/thesis.tex").unlink()
    assert judge(*usual(sides, *scorer, "--resume"))[0] == 0
    (sides / "out/thesis.tex").write_text("precious")
    status, _, err = judge(*usual(sides, *scorer, "--overwrite"))
    assert status == 2 and "also holds thesis.tex" in err
    assert (sides / "out/thesis.tex").read_text() == "precious"


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_answer_and_judge(folders: Path, models: tuple, tmp_path: Path):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    prompts = write(
        tmp_path / "prompts.jsonl", [{"prompt": f"Tell me about place {i}, please."} for i in (*range(5), 0)]
    )
    arguments = [
        "--a", folders / "policy", "--b", folders / "reference", "--prompts", prompts, "--out", tmp_path / "out",
        "--judge", folders / "policy", "--max-new-tokens", 6, "--batch-size", 2, "--resamples", 200,
    ]  # fmt: skip
    status, out, err = judge(*arguments)
    assert status == 0, err
    assert "1 prompts of" in err and "A answers 5/5" in err and "judging 10/10" in err and "of 5 prompts" in out
    figures = json.loads((tmp_path / "out/judge.json").read_text())
    assert set(figures["mean_probability"]) == {"estimate", "low", "high", "level"}
    model, _, tokenizer = models
    lines = [json.loads(line) for line in (tmp_path / "out/answers_a.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(5))
    for line in lines[:2]:  # greedy, one at a time, without padding
        ids = tokenizer.apply_chat_template(line["prompt"], add_generation_prompt=True, return_dict=False)
        found = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(ids) :]
        assert tokenizer.decode(found, skip_special_tokens=True).strip() == line["answer"]
    # The verdicts are the judge's own, in both orders.
    verdicts = [json.loads(line) for line in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    asked = ModelJudge(model, tokenizer)
    b = [json.loads(line)["answer"] for line in (tmp_path / "out/answers_b.jsonl").read_text().splitlines()]
    a = [line["answer"] for line in lines]
    texts = [line["prompt"][0]["content"] for line in lines]
    first, second = asked.probabilities(texts, a, b), asked.probabilities(texts, b, a)
    for verdict in verdicts:
        n = verdict["number"]
        expected = first[n] if verdict["order"] == "ab" else 1 - second[n]
        assert verdict["a_wins"] == pytest.approx(expected, abs=1e-6)
    assert figures["mean_probability"]["estimate"] == pytest.approx(sum(v["a_wins"] for v in verdicts) / 10)
    # Interrupted before B's last block: the answers that are there are not generated again, and nothing changes.
    complete = {name: (tmp_path / "out" / name).read_text() for name in ("answers_b.jsonl", "verdicts.jsonl")}
    (tmp_path / "out/answers_b.jsonl").write_text("".join(complete["answers_b.jsonl"].splitlines(True)[:4]))
    (tmp_path / "out/verdicts.jsonl").unlink()
    status, _, err = judge(*arguments, "--resume")
    assert status == 0 and "B answers 1/1" in err and "A answers" not in err, err
    assert {name: (tmp_path / "out" / name).read_text() for name in complete} == complete
    assert transformers.__version__ in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_sampled_answers_follow_their_seed(folders: Path, tmp_path: Path):  # noqa: F811
    prompts = write(tmp_path / "prompts.jsonl", ["Tell me about place 1, please.", "Its capital is", "It is old."])
    answers = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        options = JudgeOptions(
            a=str(folders / "policy"), b=str(folders / "policy"), prompts=prompts, out=tmp_path / name, seed=seed,
            temperature=1.0, max_new_tokens=6, batch_size=2,
        )  # fmt: skip
        run_judge(options, io.StringIO())
        answers[name] = (tmp_path / name / "answers_a.jsonl").read_text()
    assert answers["one"] == answers["again"] != answers["other"]


def test_prompts_that_do_not_fit_are_named(folders: Path, tmp_path: Path):  # noqa: F811
    long = write(tmp_path / "prompts.jsonl", ["short", "place " * 600])
    options = {"a": str(folders / "policy"), "b": str(folders / "reference"), "prompts": long}
    with pytest.raises(JudgeError, match=r"--a: prompt 1: \d+ tokens and --max-new-tokens 256 are more than the 512"):
        run_judge(JudgeOptions(**options, out=tmp_path / "out"), io.StringIO())
    with pytest.raises(JudgeError, match="give --prompts FILE"):
        run_judge(JudgeOptions(**{**options, "prompts": None}, out=tmp_path / "other"), io.StringIO())


@pytest.mark.parametrize("option", [{"min_p": 0.99}, {"typical_p": 0.01}, {"suppress_tokens": list(range(20, 400))}])
def test_a_models_own_truncation_is_off(models: tuple, option: dict):  # noqa: F811
    """Whatever it is: transformers fills from a model's generation_config what a call leaves out."""
    model, _, tokenizer = models
    prompts: list[Prompt] = [(Message("user", f"Tell me about place {i}, please."),) for i in range(3)]
    found = []
    for changed in ({}, option):
        own = model.generation_config
        model.generation_config = type(own)(**{**own.to_diff_dict(), **changed})
        before = model.generation_config
        generator = Generator("--a", model, tokenizer, max_new_tokens=8, temperature=1.0, seed=2**44)
        try:
            found.append([answer.text for answer in generator.answers(0, prompts)])
            assert model.generation_config is before
        finally:
            model.generation_config = own
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_judge_without_a_probability_is_named(folders: Path, sides: Path, monkeypatch, value: float):  # noqa: F811
    monkeypatch.setattr(ModelJudge, "probabilities", lambda self, prompts, a, b: [0.5] * (len(prompts) - 1) + [value])
    status, _, err = judge(*usual(sides, "--judge", folders / "policy"))
    assert status == 2 and "prompt 5: its verdict is" in err and "no probability" in err, err
    assert not (sides / "out/verdicts.jsonl").exists()
