"""Copying from a source on a pretrained model: what `CopyMixture` does to answers, to given texts, and to the time.

    python examples/copying.py --model DIR

DIR is a causal language model in transformers format, with or without a chat template; nothing is downloaded. Short
texts with invented names stand in the prompt, each with a question: twelve written by hand for greedy answers, and any
number made of ten forms and invented syllables. Printed as Markdown, for plain decoding and for each rule: how many
greedy answers degenerate into one repeated token, how far the copy probability varies, and the log-prob of the name
that stands in the text after the first words of an answer; then its paired difference to plain decoding with an
interval of 95 % over texts. Then the time of answers by `generate`, greedy and with beams, with the same attention
implementation.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from qkernels.decoding import CopyMixture, mark_source
from qkernels.intervals import bootstrap_mean
from qkernels.search import score_completions


class Case(NamedTuple):
    """A text, a question about it, the first words of an answer, and the name that follows."""

    text: str
    question: str
    lead: str
    right: str


CASES = [
    Case("The Harrow & Pell bakery opened in 1987 in the village of Tresmoor. Its founder, Ottoline Varga, sold rye"
         " bread from a cart before she rented the old mill. Today the bakery employs 43 people.",
         "Who founded the Harrow & Pell bakery?", "The bakery was founded by", "Ottoline Varga"),
    Case("Flight QX-512 left Lisbon at 06:40 and was diverted to Zaragoza because of a hailstorm. The captain, Ilse"
         " Brandauer, decided to wait there for three hours. The passengers reached Vienna at 15:05.",
         "Who was the captain of flight QX-512?", "The captain was", "Ilse Brandauer"),
    Case("The Kestrel 9 telescope has a mirror of 3.7 metres and stands on Mount Aurelio in northern Chile. It was"
         " built by the Nandor Institute and saw first light on 14 March 2011. It found the dwarf planet Ombrae.",
         "What is the dwarf planet that Kestrel 9 found called?", "The dwarf planet is called", "Ombrae"),
    Case("To descale the Brevino K3 coffee maker, fill the tank with 750 ml of water and one sachet of Calcinex. Press"
         " the button with the drop for five seconds. The machine rinses itself twice, which takes 22 minutes.",
         "What has to be added to the water to descale the Brevino K3?", "Add one sachet of", "Calcinex"),
    Case("The contract between Dunmore Textiles and the port of Skelvik ends on 30 June 2031. Either side may end it"
         " earlier with a notice of 90 days. Disputes are heard by the court of Aldersund.",
         "Which court hears disputes about the contract?", "Disputes are heard by the court of", "Aldersund"),
    Case("In the trial, 214 patients received tolaxifen and 209 received a placebo. After eight weeks the pain score"
         " had fallen by 31 percent with tolaxifen. The study was led by Dr. Priya Ramanujam in Pune.",
         "Who led the study?", "The study was led by Dr.", "Priya Ramanujam"),
    Case("The museum of Ostrava bought the painting in 1962 from the collector Emil Szabados. It shows the harbour of"
         " Piran in the evening. Restorers removed a yellow varnish in 1998.",
         "From whom did the museum buy the painting?", "The museum bought it from", "Emil Szabados"),
    Case("The new library of Varnhem was designed by the office Lyngdal & Roe. Its roof is covered with 2,400 copper"
         " tiles. The building was opened by Mayor Agneta Thorsell on 2 May.",
         "Who opened the library?", "The library was opened by Mayor", "Agneta Thorsell"),
    Case("Pilgrim Rock lighthouse was automated in 1974. Its last keeper, Duncan Abernathy, moved to Stornoway. The"
         " lamp can be seen from 21 nautical miles.",
         "Who was the last keeper of the lighthouse?", "The last keeper was", "Duncan Abernathy"),
    Case("The parliament of Zubrowka passed the water act with 88 votes to 41. It was drafted by the deputy Ludmila"
         " Horakova. The act obliges every town to publish the quality of its water once a month.",
         "Who drafted the water act?", "The act was drafted by", "Ludmila Horakova"),
    Case("The band Silver Thicket recorded its second album in a barn near Llanwrda. The producer was Gethin Probert."
         " The album sold 12,000 copies in its first month.",
         "Who produced the second album of Silver Thicket?", "The album was produced by", "Gethin Probert"),
    Case("The ferry Halcyon Bay runs between Kirkwall and Lerwick. Its engine was replaced in 2019 by the yard"
         " Remontowa Delta. The crossing takes seven hours and a half.",
         "Which yard replaced the engine of the Halcyon Bay?", "The engine was replaced by the yard",
         "Remontowa Delta"),
]  # fmt: skip

# A text, a question, the first words of an answer. {name} is the answer, {place} and {number} are beside the point.
FORMS = (
    ("The old mill of {place} was bought in {number} by {name}. It has ground no corn since; tourists like it.",
     "Who bought the old mill of {place}?", "The old mill was bought by"),
    ("The summit of Mount {place} was first reached in {number}. The party was led by {name}, a surveyor.",
     "Who led the party to the summit of Mount {place}?", "The party was led by"),
    ("In {place}, {number} people signed the petition. It was written by {name} and handed over on Monday.",
     "Who wrote the petition in {place}?", "The petition was written by"),
    ("The bridge of {place} is {number} metres long. Its architect, {name}, never saw it finished.",
     "Who was the architect of the bridge of {place}?", "The architect was"),
    ("The vaccine was tested on {number} volunteers in {place}. The trial was headed by {name}.",
     "Who headed the trial in {place}?", "The trial was headed by"),
    ("The {place} Prize is worth {number} crowns. This year the jury gave it to {name} for a book of poems.",
     "Who received the {place} Prize this year?", "The prize was given to"),
    ("The comet seen over {place} in {number} is named after {name}, who had calculated when it would return.",
     "After whom is the comet named?", "The comet is named after"),
    ("A fire broke out in hall {number} of the {place} works. It was noticed by {name}, a night guard.",
     "Who noticed the fire in the {place} works?", "The fire was noticed by"),
    ("The choir of {place} has {number} singers. Since last autumn it has been conducted by {name}.",
     "Who conducts the choir of {place}?", "The choir is conducted by"),
    ("The lawsuit over the harbour of {place} lasted {number} months. The verdict was read by Judge {name}.",
     "Which judge read the verdict?", "The verdict was read by Judge"),
)  # fmt: skip
_SYLLABLES = ("bran", "cor", "del", "fen", "gar", "hol", "ild", "jor", "kes", "lum", "mor", "nev", "ost", "pra", "quil",
              "ros", "sel", "tam", "und", "vik", "wen", "yar", "zol")  # fmt: skip


def generated(count: int, seed: int = 0) -> list[Case]:
    """Texts of the forms above with invented names."""
    rng = random.Random(f"copying {seed}")

    def word() -> str:
        return "".join(rng.sample(_SYLLABLES, 2)).capitalize()

    cases = []
    for number in range(count):
        text, asked, lead = FORMS[number % len(FORMS)]
        given = {"name": f"{word()} {word()}", "place": word(), "number": rng.randrange(20, 2000)}
        cases.append(Case(text.format(**given), asked.format(**given), lead, given["name"]))
    return cases


RULES: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "largepig": {"preset": "largepig"},
    "largepig-normalised": {"preset": "largepig", "normalise": True},
}
DEGENERATE = 0.5  # share of an answer's tokens that are one and the same


def prompt_of(tokenizer: Any, case: Case) -> str:
    """What the model reads, by its chat template where it has one."""
    if tokenizer.chat_template:
        asked = f"Read the text and answer the question in one sentence.\n\nText: {case.text}\n\n{case.question}"
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
            )
        )
    return f"{case.text}\n\nQuestion: {case.question}\nAnswer:"


def degenerate(tokens: Sequence[int]) -> bool:
    """Whether an answer of six tokens or more is mostly one token."""
    return len(tokens) >= 6 and Counter(tokens).most_common(1)[0][1] > DEGENERATE * len(tokens)


class Bench:
    """A model, its prompts, and what is measured on them."""

    def __init__(self, model: Any, tokenizer: Any, cases: Sequence[Case], new_tokens: int):
        self.model, self.tokenizer, self.cases, self.new_tokens = model, tokenizer, cases, new_tokens
        self.prompts = [prompt_of(tokenizer, case) for case in cases]
        self.begins = not tokenizer.chat_template
        self.marked = [self.mark([prompt], [case.text]) for prompt, case in zip(self.prompts, cases, strict=True)]

    def mark(self, prompts: list[str], texts: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return mark_source(self.tokenizer, prompts, texts, add_special_tokens=self.begins)

    def greedy(self, number: int, processor: Any = None, beams: int = 1) -> tuple[list[int], list[float]]:
        """An answer, greedy or by beams, and the copy probability of each of its tokens."""
        inputs, _ = self.marked[number]
        seen: list[float] = []

        def noted(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = processor(ids, scores)
            seen.append(float(processor.copy_probabilities[0]))
            return scores

        if processor is not None:
            processor.for_prompt(inputs["attention_mask"])
        processors = LogitsProcessorList([] if processor is None else [noted])
        ids = self.model.generate(
            **inputs, do_sample=False, num_beams=beams, max_new_tokens=self.new_tokens, logits_processor=processors,
            repetition_penalty=1.0, pad_token_id=self.tokenizer.pad_token_id or 0,
        )  # fmt: skip
        return ids[0, inputs["input_ids"].shape[1] :].tolist(), seen

    def logps(self, cases: Sequence[Case], make: Callable[[torch.Tensor], Any] | None) -> list[float]:
        """log-prob of the right name after the first words of an answer, for all texts in one batch."""
        between = "" if self.tokenizer.chat_template else " "
        starts = [prompt_of(self.tokenizer, case) + between + case.lead for case in cases]
        inputs, source = self.mark(starts, [case.text for case in cases])
        names = [self.tokenizer(" " + case.right, add_special_tokens=False)["input_ids"] for case in cases]
        width = max(map(len, names))
        mask = torch.tensor([[True] * len(name) + [False] * (width - len(name)) for name in names])
        scored = score_completions(
            self.model,
            torch.cat([inputs["input_ids"], torch.tensor([name + [0] * (width - len(name)) for name in names])], 1),
            torch.cat([inputs["attention_mask"], mask.long()], 1),
            mask,
            processors=None if make is None else [make(source)],
        )
        return [float(logp) for logp in scored.logps]


def report(name: str, answers: Sequence[Sequence[int]], copied: Sequence[float], scored: Sequence[float]) -> None:
    """A row of the table."""
    copied = sorted(copied or [0.0])
    low, high = (copied[int(share * (len(copied) - 1))] for share in (0.1, 0.9))
    print(f"| {name} | {sum(map(degenerate, answers))} of {len(answers)} | {statistics.mean(copied):.3f} ({low:.3f} to"
          f" {high:.3f}) | {statistics.mean(scored or [math.nan]):.3f} |", flush=True)  # fmt: skip


def paired(name: str, scored: Sequence[float], plain: Sequence[float]) -> None:
    """Differences to plain decoding, text by text."""
    found = bootstrap_mean([a - b for a, b in zip(scored, plain, strict=True)])
    better = sum(a > b for a, b in zip(scored, plain, strict=True))
    print(f"{name}, log-prob of the right name above plain's: {found.estimate:+.3f} ({found.low:+.3f} to"
          f" {found.high:+.3f}), higher in {better} of {len(scored)}", flush=True)  # fmt: skip


def times(bench: Bench, answers: Sequence[int], mixture: Any, beams: int) -> None:
    """Print the processor's time of a step of `generate`, plain and with the mixture, in turns."""
    seconds: dict[str, list[float]] = {"plain": [], "mixture": []}
    for i in answers:
        for name, processor in (("plain", None), ("mixture", mixture)):
            start = time.process_time()
            tokens, _ = bench.greedy(i, processor, beams)
            seconds[name].append((time.process_time() - start) / len(tokens))
    ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["mixture"], strict=True))
    how = "greedy" if beams == 1 else f"{beams} beams"
    print(f"processor seconds per token, {how}: plain {statistics.median(seconds['plain']):.3f}, mixture"
          f" {statistics.median(seconds['mixture']):.3f}; median ratio {ratio:.2f}", flush=True)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model in transformers format")
    parser.add_argument("--cases", type=int, default=40, help="texts for the scored names, twelve by hand and then"
                        " generated ones (default: 40)")  # fmt: skip
    parser.add_argument("--answers", type=int, default=6, help="texts for the greedy answers (default: 6)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a greedy answer (default: 32)")
    parser.add_argument("--beams", type=int, default=4, help="whose time is measured beside greedy (default: 4)")
    parser.add_argument("--heads", type=int, help="of the calibrated rule (default: its own)")
    parser.add_argument("--rules", default=",".join(RULES), help="separated by commas (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="eager").eval()
    judged = [*CASES, *generated(max(0, options.cases - len(CASES)))][: options.cases]
    bench = Bench(model, tokenizer, CASES[: options.answers], options.new_tokens)
    answers = range(options.answers)

    print(
        f"{options.model}: {len(judged)} texts with scored names, {len(answers)} answered, {options.threads} threads\n"
    )
    print("| | degenerate answers | copy probability, mean (10th to 90th percentile) | log-prob of the right name |\n"
          "|---|---|---|---|")  # fmt: skip
    plain = [bench.greedy(i)[0] for i in answers]
    logps = bench.logps(judged, None) if judged else []
    report("plain", plain, [0.0], logps)
    examples, compared = [("plain", plain)], []
    for name in options.rules.split(","):
        rule = dict(RULES[name])
        if options.heads and name == "calibrated":
            rule["heads"] = options.heads
        found, copied = [], []
        whole = CopyMixture(model, **rule)
        rule["heads"] = whole.heads  # found once
        for i in answers:
            for source in (None, bench.marked[i][1]):
                tokens, seen = bench.greedy(i, whole if source is None else CopyMixture(model, source, **rule))
                found.append(tokens)
                copied += seen
        make = functools.partial(CopyMixture, model, **rule)
        scored = bench.logps(judged, make) if judged else []
        report(name, found, copied, scored)
        examples.append((name, found))
        compared.append((name, scored))
    print()
    for name, scored in compared if judged else []:
        paired(name, scored, logps)
    for name, found in examples:
        for tokens in found[:4]:
            print(f"{name}: {tokenizer.decode(tokens)!r}")

    if not answers:
        return
    mixture = CopyMixture(model, heads=options.heads)
    for beams in sorted({1, options.beams}):
        times(bench, answers, mixture, beams)


if __name__ == "__main__":
    main()
