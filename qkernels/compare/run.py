"""A comparison of log-probs, from files and a model to a folder."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from .._version import __version__
from ..functional.hidden import linear_token_logps
from ..functional.logits import shift_labels
from ..records.pairs import DataError
from ..report import folders
from ..report.progress import Progress, quiet_transformers
from ..score import models
from ..score.files import as_json, temporary_name
from ..score.options import ScoreError
from ..text.lengths import position_limit
from .agreement import Agreement, Group, agreement, by_position, by_probability, grouped, log_ratio
from .options import CompareError, CompareOptions
from .page import Worst, make_page
from .rollouts import Rollout, read_rollouts, same_tokens

FIGURES, REPORT = "compare.json", "report.html"
_AROUND = 8  # tokens of context on each side
_TOKENS = 12  # token ids in the table by token


class Sides(NamedTuple):
    """Log-probs `[T]` of each sequence: the trainer's, the trainer's from rounded logits, the engine's."""

    trainer: list[Tensor]
    rounded: list[Tensor] | None
    engine: list[Tensor]


def run_compare(options: CompareOptions, stream: TextIO | None = None) -> dict[str, Any]:
    """Compare an engine's log-probs with a model's, or with another file's, into a folder.

    Args:
        options: what to do.
        stream: where progress goes; standard error by default.

    Returns:
        The contents of `compare.json`.

    Raises:
        CompareError: an option, the folder or the model stands in the way.
        DataError: a file cannot be used; the first record that is wrong, or that differs, is named.
    """
    options.check()
    _refuse_folder(options)
    try:
        models.refuse_absent("--model", options.model)
        models.refuse_absent("--tokenizer", options.tokenizer)
    except ScoreError as error:
        raise CompareError(str(error)) from None
    progress = Progress(stream or sys.stderr)
    rollouts = read_rollouts(options.engine, options.limit)
    engine = [torch.tensor(rollout.logps, dtype=torch.float64) for rollout in rollouts]
    tokenizer = _tokenizer(options)
    rounded: list[Tensor] | None = None
    if options.other is not None:
        others = read_rollouts(options.other, options.limit)
        same_tokens(rollouts, others)
        trainer = [torch.tensor(other.logps, dtype=torch.float64) for other in others]
    else:
        trainer, rounded = _of_model(options, rollouts, progress)
    return _finish(options, rollouts, Sides(trainer, rounded, engine), tokenizer)


def _refuse_folder(options: CompareOptions) -> None:
    out = options.out
    if out.is_dir() and not options.overwrite and any(out.iterdir()):
        raise CompareError(f"--out {out}: the folder has files; replace an earlier comparison with --overwrite")
    foreign = folders.foreign(out, _is_own, lambda _: False) if out.is_dir() else []
    if foreign:
        raise CompareError(
            f"--out {out}: --overwrite replaces only a comparison; the folder also holds {folders.some_of(foreign)}"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompareError(f"--out {out}: cannot be written ({error.strerror or error})") from None


def _is_own(name: str) -> bool:
    own = (FIGURES, REPORT)
    return name in own or name in map(temporary_name, own)  # the second of a run that was killed


def _tokenizer(options: CompareOptions) -> Any:
    """What shows tokens as text; None where there is none."""
    name = options.tokenizer
    if name is None and options.model is not None:
        name = models.tokenizer_folder(options.model, needed=False)
    if name is None or find_spec("transformers") is None:
        return None
    with quiet_transformers():
        try:
            return models.load_tokenizer("--tokenizer", name, options.trust_remote_code)
        except ScoreError as error:
            if options.tokenizer is None:
                return None  # a model without one; tokens are shown by their ids
            raise CompareError(str(error)) from None


def _of_model(
    options: CompareOptions, rollouts: Sequence[Rollout], progress: Progress
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of the sequences under the model, and those from logits that are rounded to 16 bits."""
    from ..integrations.transformers import head_parameters, hidden_states

    assert options.model is not None
    missing = [name for name in ("transformers", "tokenizers") if find_spec(name) is None]
    if missing:
        raise CompareError(f"a model needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    try:
        device = models.device_of(options.device)
        with quiet_transformers():
            model = models.load_model("--model", options.model, options, device)
    except ScoreError as error:
        raise CompareError(str(error)) from None
    head = head_parameters(model)
    limit = position_limit(model)
    for rollout in rollouts:
        if not rollout.prompt:
            raise DataError(f"{rollout.place}: the prompt has no token, so nothing predicts the first one")
        length, largest = len(rollout.prompt) + len(rollout.tokens), max((*rollout.prompt, *rollout.tokens))
        if largest >= head.weight.shape[0]:
            raise DataError(f"{rollout.place}: token id {largest} is outside of the model's {head.weight.shape[0]}")
        if limit is not None and length > limit:
            raise DataError(f"{rollout.place}: {length} tokens, and the model has positions for {limit}")
    narrow = head.weight.dtype if head.weight.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    how: dict[str, Any] = {"softcap": head.softcap, "logit_scale": head.logit_scale, "temperature": options.temperature}
    exact: list[Tensor] = []
    rounded: list[Tensor] = []
    with progress.phase("sequences", len(rollouts)) as phase, torch.inference_mode():
        for batch in _batches(rollouts, options.batch_tokens or (8192 if device.type == "cuda" else 1024)):
            ids, labels, mask = (tensor.to(device) for tensor in _padded(batch))
            hidden = hidden_states(model, input_ids=ids, attention_mask=mask)
            logps = linear_token_logps(hidden, head.weight, labels, bias=head.bias, **how).cpu()
            # The same inputs twice, so that the difference is that of the logits alone.
            inputs = (hidden.to(narrow), head.weight.to(narrow), labels)
            bias = None if head.bias is None else head.bias.to(narrow)
            without, with_ = (
                linear_token_logps(*inputs, bias=bias, logits_dtype=name, **how).cpu() for name in ("float32", "input")
            )
            for row, rollout in enumerate(batch):
                answer = slice(len(rollout.prompt) - 1, len(rollout.prompt) - 1 + len(rollout.tokens))
                exact.append(logps[row, answer].double())
                rounded.append(logps[row, answer].double() + (with_ - without)[row, answer].double())
            phase.step(steps=len(batch))
    return exact, rounded


def _batches(rollouts: Sequence[Rollout], budget: int) -> Iterator[list[Rollout]]:
    """Consecutive sequences whose padded tokens fit the budget; at least one."""
    batch: list[Rollout] = []
    longest = 0
    for rollout in rollouts:
        length = len(rollout.prompt) + len(rollout.tokens)
        if batch and max(longest, length) * (len(batch) + 1) > budget:
            yield batch
            batch, longest = [], 0
        batch.append(rollout)
        longest = max(longest, length)
    if batch:
        yield batch


def _padded(batch: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels aligned with the rows, and attention mask, `[B, T]`, padded on the right."""
    length = max(len(r.prompt) + len(r.tokens) for r in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, rollout in enumerate(batch):
        whole = torch.tensor((*rollout.prompt, *rollout.tokens))
        ids[row, : len(whole)] = whole
        labels[row, len(rollout.prompt) : len(whole)] = whole[len(rollout.prompt) :]
        mask[row, : len(whole)] = 1
    return ids, shift_labels(labels), mask


def _finish(options: CompareOptions, rollouts: list[Rollout], sides: Sides, tokenizer: Any) -> dict[str, Any]:
    limits = (options.low, options.high)
    result = agreement(sides.trainer, sides.engine, limits=limits)
    rounding = None if sides.rounded is None else agreement(sides.rounded, sides.trainer, limits=limits)
    differences = [log_ratio(a, b) for a, b in zip(sides.trainer, sides.engine, strict=True)]
    flat = torch.cat(differences)
    groups: list[tuple[str, Sequence[Group]]] = [
        ("position in the generated text", by_position(differences, limits)),
        ("probability of the token", by_probability(torch.cat(sides.engine), flat, limits)),
        ("token", _by_token(rollouts, flat, limits, tokenizer)),
    ]
    names = (str(options.other or options.model), str(options.engine))
    figures = {
        "version": __version__,
        "trainer": names[0],
        "engine": names[1],
        "temperature": options.temperature,
        "limits": list(limits),
        "all": _plain(result),
        "rounding": None if rounding is None else _plain(rounding),
        "groups": {heading: [row._asdict() for row in rows] for heading, rows in groups},
    }
    worst = _worst(rollouts, sides, flat, options.shown, tokenizer)
    page = make_page(names, result, rounding, groups, worst, limits)
    for name, text in ((FIGURES, as_json(figures)), (REPORT, page)):
        temporary = options.out / temporary_name(name)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, options.out / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CompareError(f"--out {options.out}: {name} cannot be written ({error.strerror or error})") from None
    return figures


def _plain(result: Agreement) -> dict[str, Any]:
    return {k: list(v[:3]) if isinstance(v, tuple) else v for k, v in result._asdict().items()}


def _by_token(rollouts: Sequence[Rollout], flat: Tensor, limits: tuple[float, float], tokenizer: Any) -> list[Group]:
    """The tokens that add most to the sum of |log r|."""
    ids = torch.tensor([token for rollout in rollouts for token in rollout.tokens])
    values, keys = ids.unique(return_inverse=True)
    sums = torch.zeros(len(values), dtype=torch.float64).index_add_(0, keys, flat.abs())
    order = sums.argsort(descending=True)[:_TOKENS]
    place = torch.full((len(values),), -1)
    place[order] = torch.arange(len(order))
    return grouped([_shown(tokenizer, [int(values[n])]) for n in order], place[keys], flat, limits)


def _worst(rollouts: Sequence[Rollout], sides: Sides, flat: Tensor, shown: int, tokenizer: Any) -> list[Worst]:
    places = [(n, t) for n, rollout in enumerate(rollouts) for t in range(len(rollout.tokens))]
    found = []
    for index in flat.abs().argsort(descending=True)[:shown].tolist():
        n, t = places[index]
        rollout = rollouts[n]
        whole = (*rollout.prompt, *rollout.tokens)
        at = len(rollout.prompt) + t
        found.append(
            Worst(
                place=f"sequence {n + 1}, token {t + 1}",
                trainer=float(sides.trainer[n][t]),
                engine=float(sides.engine[n][t]),
                log_ratio=float(flat[index]),
                before=_shown(tokenizer, whole[max(0, at - _AROUND) : at]),
                token=_shown(tokenizer, [whole[at]]),
                after=_shown(tokenizer, whole[at + 1 : at + 1 + _AROUND]),
            )
        )
    return found


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    return str(tokenizer.decode(list(ids))) if len(ids) else ""


def summary(figures: dict[str, Any], out: Path) -> str:
    """What the command prints at the end."""
    found = figures["all"]
    low, high = figures["limits"]
    lines = [
        f"{found['tokens']} tokens of {found['sequences']} sequences",
        f"mean ratio {found['ratio'][0]:.5f} [{found['ratio'][1]:.5f}, {found['ratio'][2]:.5f}],"
        f" {100 * found['outside'][0]:.2f} % outside {low:g} to {high:g}",
        f"KL(engine || trainer) per token {found['k3'][0]:.2e} nats (k3) [{found['k3'][1]:.2e}, {found['k3'][2]:.2e}]",
    ]
    rounding = figures["rounding"]
    if rounding is not None:
        share = rounding["k3"][0] / found["k3"][0] if found["k3"][0] else math.inf
        explained = f"{100 * min(share, 1.0):.0f} % of it" if found["k3"][0] else "all of it"
        lines.append(f"rounding logits to 16 bits alone makes {rounding['k3'][0]:.2e} nats: {explained}")
    return "\n".join((*lines, f"report: {out / REPORT}"))
