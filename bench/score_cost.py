"""What scoring costs beside the model itself: time of the head beyond its bare products, and memory by length.

    python -m bench.score_cost                      pairs generated here
    python -m bench.score_cost --data FILE          preference pairs of your own (`qkernels.data`)
    python -m bench.score_cost --model DIR --data FILE --batch-tokens 1024 --max-length 0 --lengths
                                                    a model of your own, pairs as they are: all of scoring

Without `--model`, a Llama with random weights (`--hidden`, `--layers`, `--vocabulary`) and a reference of the same
shape score every answer token with the default outputs of `qkernels score`. Timed in turn for each batch, so that all
share the machine's noise:

    forward    both models up to their heads
    products   hidden states of the answers' rows times the heads, chunk by chunk, into a buffer that is kept
    head       the same rows to log-probs, entropy, KLs, Q, V, A and rewards, products included

"Beyond the products" is head - products, as a share of forward. Memory is the highest rise of
the resident set during `head`.

With `--model`, which is policy and reference, in processor time and in turn for each batch: all of scoring
(`TokenScorer.scores`: batches with their padding, both models, head, outputs), and its floor: each sequence alone
through both models up to their heads, without padding, and the bare products.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qkernels import linear_token_stats, shift_labels
from qkernels.core import memory
from qkernels.data import Preference, read_preferences
from qkernels.demo.synthetic import generate
from qkernels.demo.tokenizer import train_tokenizer
from qkernels.integrations.transformers import head_parameters, hidden_states
from qkernels.score import Answer, Encoder, TokenScorer
from qkernels.score.tokens import IGNORE, _mdp
from qkernels.text.lengths import batches_by_length

from .measure import machine, peak_memory


def _model(args: argparse.Namespace, seed: int) -> Any:
    if args.model is not None:
        dtype = getattr(torch, args.dtype)
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().requires_grad_(False)
    torch.manual_seed(seed)
    heads = max(1, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval().requires_grad_(False)


def _answers(args: argparse.Namespace) -> tuple[list[Answer], str]:
    if args.data is None:
        data = generate(0, args.pairs, seed=0)
        pairs: Sequence[Preference] = data.held_out
        what = f"{len(pairs)} generated pairs"
    else:
        pairs = read_preferences(args.data).pairs[: args.pairs]
        what = f"{len(pairs)} pairs of {args.data.name}"
    texts = [text for pair in pairs for text in (*(m.content for m in pair.prompt), pair.chosen, pair.rejected)]
    if args.model is None:
        tokenizer = train_tokenizer(texts, min(8000, args.vocabulary))
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoder = Encoder(tokenizer, max_length=args.max_length or None)
    encoded = [answer for both in encoder.pairs(dict(enumerate(pairs))) for answer in both]
    return [Answer(answer.prompt, answer.ids) for answer in encoded], what


def _padded(answers: Sequence[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels aligned with the rows."""
    length = max(len(answer.prompt) + len(answer.ids) for answer in answers)
    ids = torch.zeros(len(answers), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, (prompt, answer, _) in enumerate(answers):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, shift_labels(labels)


class _Timer:
    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = self.clock()
        result = call(*arguments)
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start
        return result


def _hidden(scorer: TokenScorer, ids: torch.Tensor) -> list[torch.Tensor]:
    return [hidden_states(m, input_ids=ids) for m in (scorer.model, scorer.reference)]


def _head(scorer: TokenScorer, hidden: Sequence[torch.Tensor], labels: torch.Tensor) -> None:
    """What scoring does after the models' own forward."""
    weights = [head_parameters(m).weight for m in (scorer.model, scorer.reference)]
    stats = linear_token_stats(
        hidden[0], weights[0], labels, reference_hidden=hidden[1], reference_weight=weights[1], outputs=scorer._fields
    )
    values = {name: getattr(stats, name) for name in scorer._fields}
    _mdp(values, scorer.beta, labels != IGNORE)


def _products(scorer: TokenScorer, hidden: Sequence[torch.Tensor], labels: torch.Tensor, buffer: torch.Tensor) -> None:
    """The two heads' products over the same rows, and nothing else."""
    valid = (labels != IGNORE).reshape(-1).nonzero()[:, 0]
    for rows in valid.split(buffer.shape[0]):
        for model, states in zip((scorer.model, scorer.reference), hidden, strict=True):
            x = states.reshape(-1, states.shape[-1])[rows]
            weight = head_parameters(model).weight
            if x.dtype == buffer.dtype:
                torch.mm(x, weight.t(), out=buffer[: x.shape[0]])
            else:
                torch.mm(x, weight.t())


@torch.no_grad()
def measure_time(scorer: TokenScorer, answers: Sequence[Answer], rounds: int) -> list[dict[str, float]]:
    """Seconds of each part over all batches, per round."""
    buffer = _buffer(scorer)
    groups = list(batches_by_length([len(a.prompt) + len(a.ids) for a in answers], scorer.batch_tokens))
    found = []
    for round_ in range(rounds + 1):
        timer = _Timer()
        for group in groups if round_ else groups[:2]:  # the first is a warm-up
            ids, labels = _padded([answers[i] for i in group])
            hidden = timer("forward", _hidden, scorer, ids)
            timer("products", _products, scorer, hidden, labels, buffer)
            timer("head", _head, scorer, hidden, labels)
        found.append(timer.seconds)
    return found[1:]


@torch.no_grad()
def measure_floor(scorer: TokenScorer, answers: Sequence[Answer], rounds: int) -> list[dict[str, float]]:
    """Processor seconds of scoring and of the parts of its floor over all batches, per round."""
    buffer = _buffer(scorer)
    groups = list(batches_by_length([answer.length for answer in answers], scorer.batch_tokens))
    list(scorer.scores([answers[i] for i in groups[-1]]))  # a warm-up
    found = []
    for _ in range(rounds):
        timer = _Timer(time.process_time)
        for group in groups:
            timer("scoring", lambda group=group: list(scorer.scores([answers[i] for i in group])))
            for i in group:
                ids, labels = _padded([answers[i]])
                hidden = timer("forward", _hidden, scorer, ids)
                timer("products", _products, scorer, hidden, labels, buffer)
        found.append(timer.seconds)
    return found


def _padding(scorer: TokenScorer, answers: Sequence[Answer]) -> float:
    """Positions of padding, as a share of tokens."""
    lengths = [answer.length for answer in answers]
    padded = sum(len(group) * lengths[group[0]] for group in batches_by_length(lengths, scorer.batch_tokens))
    return padded / sum(lengths) - 1


def _buffer(scorer: TokenScorer) -> torch.Tensor:
    return torch.empty(max(1, 256 * 2**20 // (8 * scorer.vocabulary)), scorer.vocabulary)


@torch.no_grad()
def measure_memory(scorer: TokenScorer, lengths: Sequence[int]) -> list[tuple[int, int | None, int]]:
    """Per length of a sequence: by how much the head raises the memory at most; bytes of both models' logits."""
    rng = random.Random(0)
    rows = []
    for length in lengths:
        answer = Answer([1] * 16, [rng.randrange(scorer.vocabulary) for _ in range(length - 16)])
        ids, labels = _padded([answer])
        memory.drop_scratch()  # what a call before has left would be taken for nothing
        head = peak_memory(functools.partial(_head, scorer, _hidden(scorer, ids), labels))
        rows.append((length, head, 2 * 4 * length * scorer.vocabulary))
    return rows


def _print_times(scorer: TokenScorer, answers: Sequence[Answer], answer_tokens: int, rounds: int) -> None:
    print("| round | forward s | products s | head s | beyond the products s | of forward | answer tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for number, seconds in enumerate(measure_time(scorer, answers, rounds), 1):
        beyond = seconds["head"] - seconds["products"]
        rate = answer_tokens / (seconds["forward"] + seconds["head"])
        times = " | ".join(f"{value:.1f}" for value in (*seconds.values(), beyond))
        print(f"| {number} | {times} | {beyond / seconds['forward']:.1%} | {rate:.0f} |")


def _print_floor(scorer: TokenScorer, answers: Sequence[Answer], rounds: int) -> None:
    print(f"Processor time; padding is {_padding(scorer, answers):.1%} of the tokens\n")
    print("| round | scoring s | forward, one by one s | products s | scoring / floor |")
    print("|---|---|---|---|---|")
    for number, seconds in enumerate(measure_floor(scorer, answers, rounds), 1):
        ratio = seconds["scoring"] / (seconds["forward"] + seconds["products"])
        print(f"| {number} | {' | '.join(f'{value:.1f}' for value in seconds.values())} | {ratio:.3f} |")


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.score_cost", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="policy and reference (default: random weights)")
    add("--data", type=Path, metavar="FILE")
    add("--pairs", type=int, default=300)
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--vocabulary", type=int, default=32000)
    add("--max-length", type=int, default=1024)
    add("--batch-tokens", type=int, default=8192)
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--rounds", type=int, default=1)
    add("--lengths", type=int, nargs="*", default=[2048, 4096, 8192])
    args = parser.parse_args()
    answers, what = _answers(args)
    scorer = TokenScorer(_model(args, 0), _model(args, 1), batch_tokens=args.batch_tokens)
    tokens = sum(len(a.prompt) + len(a.ids) for a in answers)
    answer_tokens = sum(len(a.ids) for a in answers)
    parameters = sum(p.numel() for p in scorer.model.parameters())
    facts = machine()
    cut = f", cut to {args.max_length} tokens" if args.max_length else ""
    print(f"{what}{cut}: {tokens} tokens, {answer_tokens} of answers")
    config = scorer.model.config
    print(
        f"{args.model.name if args.model else 'Llama'}, {config.num_hidden_layers} layers, width {config.hidden_size},"
        f" vocabulary {config.vocab_size}: {parameters / 1e6:.1f} M parameters, {args.dtype}; policy and reference"
    )
    print(f"{facts['processor']}; {facts['software']}\n")
    if args.model is None:
        _print_times(scorer, answers, answer_tokens, args.rounds)
    else:
        _print_floor(scorer, answers, args.rounds)
    if args.lengths:
        print("\n| tokens of one sequence | head MiB | both models' logits MiB |")
        print("|---|---|---|")
        for length, head, logits in measure_memory(scorer, args.lengths):
            print(f"| {length} | {'–' if head is None else f'{head / 2**20:.0f}'} | {logits / 2**20:.0f} |")


if __name__ == "__main__":
    main()
