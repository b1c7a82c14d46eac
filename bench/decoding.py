"""What search and decoding-time processors cost beside plain `generate`: `python -m bench.decoding`.

Random models of one size as base, proxy and reference, a batch of prompts padded on the left, no end token, so that
every contender writes the same number of tokens. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from qkernels.decoding import CopyMixture, ProxyTuning
from qkernels.search import beam_search


def _model(arguments: argparse.Namespace, seed: int, attention: str) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=4, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (
        ("batch", 4), ("prompt", 64), ("new", 48), ("beams", 5), ("vocab", 32000), ("hidden", 256), ("layers", 4),
        ("rounds", 5), ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--only", default="", metavar="TEXT", help="contenders with this in their name (default: all)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    base, proxy, reference = (_model(arguments, seed, "sdpa") for seed in (1, 2, 3))
    eager = _model(arguments, 1, "eager")
    ids = torch.randint(1, arguments.vocab, (arguments.batch, arguments.prompt))
    mask = torch.ones_like(ids)
    mask[0, : arguments.prompt // 4] = 0
    ids = ids * mask
    shared = {"num_beams": arguments.beams, "max_new_tokens": arguments.new}

    def plain(model: LlamaForCausalLM, processors: Sequence[object] = ()) -> None:
        model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, length_penalty=0.0, early_stopping="never",
            num_return_sequences=arguments.beams, logits_processor=LogitsProcessorList(processors), **shared,
        )  # fmt: skip

    def tuning(use_cache: bool) -> list[object]:
        return [ProxyTuning(proxy, reference, use_cache=use_cache, attention_mask=mask)]

    copying = CopyMixture(eager, attention_mask=mask)
    published = CopyMixture(eager, preset="largepig", attention_mask=mask)

    contenders: dict[str, Callable[[], object]] = {
        "generate": lambda: plain(base),
        "beam_search": lambda: beam_search(base, ids, mask, **shared),
        "beam_search with a reference": lambda: beam_search(base, ids, mask, reference_model=reference, **shared),
        "generate with ProxyTuning (two models more)": lambda: plain(base, tuning(True)),
        "the same, use_cache=False": lambda: plain(base, tuning(False)),
        "generate, eager attention": lambda: plain(eager),
        "generate with CopyMixture, eager attention": lambda: plain(eager, [copying]),
        "the same with preset='largepig', eager attention": lambda: plain(eager, [published]),
    }
    contenders = {name: run for name, run in contenders.items() if arguments.only in name}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(arguments.rounds + 1):
        for name, run in contenders.items():  # in turns, so that a busy machine is unfair to all alike
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    against = {name: "generate, eager attention" if "eager" in name else "generate" for name in contenders}
    print(
        f"{arguments.batch} prompts of {arguments.prompt} tokens, {arguments.new} new ones, {arguments.beams} beams;"
        f" {arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}, {arguments.threads} threads\n"
    )
    print("| | seconds | times plain generate |\n|---|---|---|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.2f} | {median / statistics.median(times[against[name]]):.2f} |")


if __name__ == "__main__":
    main()
