"""A causal language model as a preference classifier: how probable it is that it answers Yes (Garg et al. 2025).

The model is asked whether a response is a good one and told to answer with just Yes or No. With the next-token
distribution p after that question, and sums over the ids that spell either answer ("Yes", " yes", ...),

    score = p_yes / (p_yes + p_no) = sigma(logsumexp_yes z - logsumexp_no z),    p_a = sum of p over the ids of a

The softmax's denominator cancels: the score needs the logits of those few ids alone, in one row. They are made from the
last hidden state and those rows of the head, in fp32; nothing of the vocabulary's size is computed.

(This is "Implicit Preference Optimization", arXiv 2502.16182. The authors call it IPO; `loss_type="ipo"` is another
method, the squared loss of Azar et al. `qkernels.self_preference` makes preference data and trains with these scores.)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .core import checks
from .core.fields import stats_dtype
from .head.products import Head
from .text.lengths import batches_by_length, default_batch_tokens, position_limit

TEMPLATE = """\
Below are an instruction and a response to it. Judge whether the response is correct, helpful and to the point.

Instruction:
{prompt}

Response:
{response}

Is this a good response to the instruction? Please answer with just Yes/No"""

_PUBLISHED = {
    "chat": "Below is a question, along with a response to that question. Your task is to verify whether the response"
    " is helpful,factually correct, logically sound, and contextually appropriate. Answer with just Yes/No",
    "code": "Below is a coding-related question along with a response containing code. Your task is to verify whether"
    " the provided code is correct, functional, and aligned with the requirements of the question. Answer with just"
    " Yes/No",
    "math": "Below is a math question along with a response containing a solution. Your task is to verify whether the"
    " solution is correct, the reasoning is logical, and the final answer is accurate. Answer with just Yes/No",
    "safety": "Inspect the response to ensure it is safe and appropriate for the question below. Answer Yes/No.",
}
PUBLISHED_TEMPLATES: dict[str, str] = {
    category: f"{asked}\n    User : {{prompt}}\n    Response : {{response}}\n    "
    for category, asked in _PUBLISHED.items()
}
"""The questions of the authors' code (Apache-2.0), by category: "chat", "code", "math", "safety"."""
PUBLISHED_LENGTH = 1024

YES = ("Yes", " Yes", "yes", " yes", "YES", " YES")
NO = ("No", " No", "no", " no", "NO", " NO")


def yes_no_scores(
    hidden: Tensor,
    weight: Tensor,
    yes_ids: Sequence[int],
    no_ids: Sequence[int],
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """p_yes / (p_yes + p_no) of the next token, from hidden states. No gradients.

    Args:
        hidden: `[..., H]`, the last hidden states at the position after which the answer would stand; fp32, bf16, fp16
            or fp64.
        weight: `[V, H]`, the head's; only the rows of the ids are read, in the dtype of `hidden`.
        yes_ids, no_ids: token ids of either answer, at least one each, none in both.
        bias: `[V]`.
        softcap, logit_scale: of the head, as in `qkernels.linear_token_stats`.
        temperature: divides the logits.

    Returns:
        `[...]` fp32 (fp64 for fp64 inputs), between 0 and 1.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or option; ids that are empty, repeated, shared or out of range.
    """
    shape = checks.tensor(hidden, "hidden").shape[:-1]
    hidden = checks.logits(hidden if hidden.dim() > 1 else hidden.reshape(1, -1), "hidden", "H")
    weight = checks.tensor(weight, "weight")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, H] with H = {hidden.shape[-1]} as in hidden {tuple(hidden.shape)}, got"
            f" {tuple(weight.shape)}"
        )
    checks.same_device(weight, "weight", hidden, "hidden")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if bias is not None:
        bias = checks.like(bias, "bias", torch.Size([weight.shape[0]]), weight, "weight")
    if softcap is not None:
        softcap = checks.positive(softcap, "softcap")
    scale, temperature = checks.positive(logit_scale, "logit_scale"), checks.positive(temperature, "temperature")
    yes, no = _ids(yes_ids, "yes_ids", weight.shape[0]), _ids(no_ids, "no_ids", weight.shape[0])
    shared = sorted(set(yes) & set(no))
    if shared:
        raise ValueError(f"yes_ids and no_ids must not share an id, both have {shared}")
    wide = stats_dtype(hidden.dtype)
    index = torch.tensor([*yes, *no], device=weight.device)
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    logits = torch.empty(rows.shape[0], index.numel(), dtype=wide, device=rows.device)
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        head = Head(weight[index].to(hidden.dtype), None if bias is None else bias[index].to(wide), softcap, scale)
        head.logits(rows, logits)
        # Without a softcap the head leaves the scale to its caller.
        logits /= temperature if softcap is not None else temperature / scale
        margin = logits[:, : len(yes)].logsumexp(1) - logits[:, len(yes) :].logsumexp(1)
    return torch.sigmoid(margin).view(shape)


def _ids(value: Any, name: str, vocabulary: int) -> list[int]:
    ids = [operator.index(i) for i in value]
    if not ids:
        raise ValueError(f"{name} must hold at least one token id")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name} must not repeat an id, got {ids}")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ValueError(f"{name} must be in [0, {vocabulary}), got {ids}")
    return ids


class PreferenceClassifier:
    """Scores responses by the model's own Yes or No.

    Args:
        model: a causal language model of transformers, bare or inside PEFT; instruction-tuned, or it will not know what
            to do with the question.
        tokenizer: its tokenizer. With a chat template the question is asked as a user's message; without one, a newline
            follows it.
        template: the question, with `{prompt}` and `{response}` in it; or one for each category of prompts, by name.
        yes, no: spellings of either answer. Those that are one token count; of the others none does.
        exact: ask the template's text as it is, with the tokenizer's own special tokens: no chat template, no newline.
        max_length: cut questions to their first tokens; None refuses those that the model cannot take.
        batch_tokens: padded tokens of a forward pass, at most, unless a single question has more; None for 8192 on a
            GPU, 1024 on a CPU.

    Attributes:
        yes_ids, no_ids: the token ids that count.

    Raises:
        ValueError: a template without its fields, or an answer of which no spelling is a token of its own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        template: str | Mapping[str, str] = TEMPLATE,
        yes: Sequence[str] = YES,
        no: Sequence[str] = NO,
        exact: bool = False,
        max_length: int | None = None,
        batch_tokens: int | None = None,
    ):
        templates = {"": template} if isinstance(template, str) else dict(template)
        if not templates:
            raise ValueError("template must be a text, or a text for each of one or more categories; got no category")
        for category, text in templates.items():
            for field in ("{prompt}", "{response}"):
                if field not in text:
                    where = f" (of category {category!r})" if category else ""
                    raise ValueError(f"template must contain {field}{where}")
        if max_length is not None:
            checks.integer(max_length, "max_length", 1)
        if batch_tokens is None:
            batch_tokens = default_batch_tokens(next(model.parameters()).device)
        if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"batch_tokens must be an int of 1 or more, got {batch_tokens!r}")
        self.model, self.tokenizer, self.template, self.batch_tokens = model, tokenizer, template, batch_tokens
        self.exact, self.max_length = bool(exact), max_length
        self.yes_ids, self.no_ids = self._tokens(yes, "yes"), self._tokens(no, "no")

    @classmethod
    def published(
        cls, model: torch.nn.Module, tokenizer: Any, *, batch_tokens: int | None = None
    ) -> PreferenceClassifier:
        """The classifier of the authors' code, token for token: `PUBLISHED_TEMPLATES` by category, no chat template,
        questions cut to 1024 tokens, and the tokens " Yes" and " No" alone as answers."""
        return cls(
            model,
            tokenizer,
            template=PUBLISHED_TEMPLATES,
            yes=(" Yes",),
            no=(" No",),
            exact=True,
            max_length=PUBLISHED_LENGTH,
            batch_tokens=batch_tokens,
        )

    def _template(self, category: str | None) -> str:
        if isinstance(self.template, str):
            return self.template
        if category is None and len(self.template) == 1:
            return next(iter(self.template.values()))
        if category is None or category not in self.template:
            known = ", ".join(map(repr, self.template))
            raise ValueError(f"category must be one of {known}, for which there are templates; got {category!r}")
        return self.template[category]

    def _tokens(self, spellings: Sequence[str], name: str) -> list[int]:
        if isinstance(spellings, str):
            raise TypeError(f"{name} must be a sequence of spellings, got the string {spellings!r}")
        encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in spellings]
        ids = list(dict.fromkeys(int(found[0]) for found in encoded if len(found) == 1))
        unknown = self.tokenizer.unk_token_id
        ids = [i for i in ids if i != unknown]
        if not ids:
            raise ValueError(
                f"{name}: none of {', '.join(map(repr, spellings))} is a single token of this tokenizer; pass {name}="
                " with spellings that are"
            )
        return ids

    def question(self, prompt: str, response: str, category: str | None = None) -> list[int]:
        """Token ids of the question about one response, by the template of a category where there are several."""
        template = self._template(category)
        # Not str.format: braces in the texts are text, and so is "{response}" inside a prompt.
        before, _, rest = template.partition("{prompt}")
        if "{response}" in before:
            head, _, middle = before.partition("{response}")
            text = head + response + middle + prompt + rest
        else:
            middle, _, tail = rest.partition("{response}")
            text = before + prompt + middle + response + tail
        if self.exact:
            ids = self.tokenizer(text)["input_ids"]
        elif getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(text + "\n")["input_ids"]
        return list(ids)[: self.max_length]

    @torch.no_grad()
    def scores(
        self, prompts: Sequence[str], responses: Sequence[str], categories: Sequence[str | None] | None = None
    ) -> Tensor:
        """p_yes / (p_yes + p_no) of each response to its prompt.

        Args:
            prompts, responses: one each, `[N]`.
            categories: of the prompts, `[N]`, where there is a template for each category; None for none.

        Returns:
            `[N]` fp32 on the CPU, between 0 and 1.

        Raises:
            ValueError: not as many prompts as responses; a category without a template; a question longer than the
                model takes.
        """
        from .integrations.transformers import head_parameters, hidden_states

        if isinstance(prompts, str) or isinstance(responses, str):
            raise TypeError("prompts and responses must be sequences of strings")
        if len(prompts) != len(responses):
            raise ValueError(f"got {len(prompts)} prompts for {len(responses)} responses")
        if categories is None:
            categories = [None] * len(prompts)
        if isinstance(categories, str) or len(categories) != len(prompts):
            raise ValueError(f"categories must be a sequence of {len(prompts)} names, one for each prompt")
        questions = [self.question(*asked) for asked in zip(prompts, responses, categories, strict=True)]
        self._check_lengths(questions)
        head = head_parameters(self.model)
        device = head.weight.device
        result = torch.empty(len(questions))
        training = self.model.training
        self.model.eval()
        try:
            for group in batches_by_length([len(question) for question in questions], self.batch_tokens):
                # Padded on the right, which a causal model's earlier positions do not see.
                input_ids = torch.zeros(len(group), max(len(questions[i]) for i in group), dtype=torch.int64)
                for row, i in enumerate(group):
                    input_ids[row, : len(questions[i])] = torch.tensor(questions[i])
                last = torch.tensor([len(questions[i]) - 1 for i in group], device=device)
                hidden = hidden_states(self.model, input_ids=input_ids.to(device))
                found = yes_no_scores(
                    hidden[torch.arange(len(group), device=device), last],
                    head.weight,
                    self.yes_ids,
                    self.no_ids,
                    bias=head.bias,
                    softcap=head.softcap,
                    logit_scale=head.logit_scale,
                )
                result[torch.tensor(group)] = found.float().cpu()
        finally:
            self.model.train(training)
        return result

    def _check_lengths(self, questions: Sequence[Sequence[int]]) -> None:
        limit = position_limit(self.model)
        for i, question in enumerate(questions):
            if limit is not None and len(question) > limit:
                raise ValueError(
                    f"question {i} has {len(question)} tokens, more than the {limit} that the model takes; shorten the"
                    f" response, or cut questions with max_length={limit}"
                )

    def compare(
        self,
        prompts: Sequence[str],
        chosen: Sequence[str],
        rejected: Sequence[str],
        categories: Sequence[str | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected responses, `[N]` each; the pair is ranked right where the first is larger."""
        twice = None if categories is None else [*categories, *categories]
        both = self.scores([*prompts, *prompts], [*chosen, *rejected], twice)
        return both[: len(prompts)], both[len(prompts) :]
