"""From preference pairs to token ids with the tokenizer of any model: prompt formats, offsets of tokens, cuts.

The prompt and an answer are rendered and tokenised as one text, as in training; a token that reaches over the end of
the prompt belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data import Message, Preference
from ..text.characters import first_line
from ..text.lengths import kept_lengths
from .options import ScoreError

FORMATS = ("auto", "chat", "plain")


class EncodedAnswer(NamedTuple):
    """Token ids of one answer, what is read before it, and where its tokens stand in the text.

    prompt, ids: token ids; `ids` with what ends the answer (end token, the template's closing marks).
    texts: one per token of `ids`; joined, they are the rendered answer. A token that continues a character begun by the
        one before is "".
    offsets: characters `[start, end)` of the answer as the data has it; (-1, -1) for tokens outside it.
    cut_prompt, cut_answer: tokens that were cut off.
    """

    prompt: list[int]
    ids: list[int]
    texts: list[str]
    offsets: list[tuple[int, int]]
    cut_prompt: int = 0
    cut_answer: int = 0

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.ids)


class Encoder:
    """Renders and tokenises answers.

    Args:
        tokenizer: of transformers.
        prompt_format: "chat" renders the tokenizer's chat template; "plain" puts prompt, answer and end token one after
            the other; "auto" is "chat" where there is a template.
        max_length: longer sequences are cut to it; None for no cut.
        limit: most tokens the model takes; None if it does not say.
        other: the reference's tokenizer, which has to make the same of every text; None to take that for granted.

    Raises:
        ScoreError: options that do not go together.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_format: str = "auto",
        max_length: int | None = None,
        limit: int | None = None,
        other: Any = None,
    ):
        if prompt_format not in FORMATS:
            raise ScoreError(f"--prompt-format must be one of {', '.join(FORMATS)}, got {prompt_format!r}")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if prompt_format == "chat" and not has_template:
            raise ScoreError("--prompt-format chat: the tokenizer has no chat template; --chat-template gives it one")
        if max_length is not None and limit is not None and max_length > limit:
            raise ScoreError(f"--max-length {max_length} is more than the {limit} tokens that the model takes")
        self.tokenizer, self.max_length, self.limit, self.other = tokenizer, max_length, limit, other
        self.chat = has_template if prompt_format == "auto" else prompt_format == "chat"
        self.special = set(tokenizer.all_special_ids)

    def pairs(self, pairs: Mapping[int, Preference]) -> list[tuple[EncodedAnswer, EncodedAnswer]]:
        """Encode the answers of pairs, chosen and rejected, all at once.

        Args:
            pairs: by their numbers, which messages name.

        Raises:
            ScoreError: a pair that cannot be rendered, or does not fit the model; names it.
        """
        sides = [
            (f"{place(number)}, {side} answer", pair.prompt, answer)
            for number, pair in pairs.items()
            for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
        ]
        rendered = [self._render(*side) for side in sides]
        texts = [text for text, _, _ in rendered]
        encoded = self._tokenise(texts)
        if self.other is not None:
            others = self.other(texts, add_special_tokens=not self.chat, verbose=False)["input_ids"]
            for (where, _, _), (ids, _), its in zip(sides, encoded, others, strict=True):
                if ids != list(its):
                    at = _common(ids, its)
                    raise ScoreError(
                        f"{where}: the tokenizers of the model and the reference make different tokens of it, from"
                        f" token {at} on ({_shown(self.tokenizer, ids[at:])} and {_shown(self.other, its[at:])}); their"
                        " log-probs cannot be compared"
                    )
        answers = [
            self._answer(where, text, boundary, start, answer, *tokens)
            for (where, _, answer), (text, boundary, start), tokens in zip(sides, rendered, encoded, strict=True)
        ]
        fitted = []
        for number, chosen, rejected in zip(pairs, answers[::2], answers[1::2], strict=True):
            longest = max(len(chosen.ids), len(rejected.ids))
            fitted.append(
                (
                    self._fit(f"{place(number)}, chosen answer", chosen, longest),
                    self._fit(f"{place(number)}, rejected answer", rejected, longest),
                )
            )
        return fitted

    def _render(self, where: str, prompt: tuple[Message, ...], answer: str) -> tuple[str, int, int]:
        """The whole text, where the answer's part of it begins, and where the answer itself does (-1: unknown)."""
        if not self.chat:
            if len(prompt) > 1:
                raise ScoreError(
                    f"{where}: its prompt is a conversation of {len(prompt)} messages, which the plain format cannot"
                    " write; use a tokenizer with a chat template, or give one with --chat-template"
                )
            text = prompt[0].content
            return text + answer, len(text), len(text)
        messages = [{"role": message.role, "content": message.content} for message in prompt]
        try:
            before = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            whole = self.tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": answer}], tokenize=False
            )
        except Exception as error:  # jinja2's errors, and whatever a template raises
            raise ScoreError(f"{where}: the chat template refuses the conversation ({first_line(error)})") from error
        boundary = len(before) if whole.startswith(before) else -1
        start = whole.find(answer, max(boundary, 0)) if boundary >= 0 else whole.rfind(answer)
        if start < 0:  # many templates strip the messages
            stripped = answer.strip()
            start = whole.find(stripped, boundary) if boundary >= 0 else whole.rfind(stripped)
            if start >= 0:
                start -= len(answer) - len(answer.lstrip())
        if boundary < 0:
            # The template writes the prompt otherwise once an answer follows: the answer's part begins with its text.
            if start < 0:
                raise ScoreError(f"{where}: the chat template does not write the answer as it is; use another one")
            boundary = start + len(answer) - len(answer.lstrip())
        return whole, boundary, start if start >= 0 else -len(whole) - len(answer)

    def _tokenise(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        """Ids and offsets of whole texts; offsets are None from tokenizers that do not tell them."""
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        options: dict[str, Any] = {"return_offsets_mapping": True} if fast else {}
        # Not verbose: what is too long is this package's to refuse or to cut, not the tokenizer's to warn of.
        encoded = self.tokenizer(texts, add_special_tokens=not self.chat, verbose=False, **options)
        offsets = encoded["offset_mapping"] if fast else [None] * len(texts)
        return [
            (list(ids), None if spans is None else [(int(a), int(b)) for a, b in spans])
            for ids, spans in zip(encoded["input_ids"], offsets, strict=True)
        ]

    def _answer(
        self,
        where: str,
        text: str,
        boundary: int,
        start: int,
        answer: str,
        ids: list[int],
        offsets: list[tuple[int, int]] | None,
    ) -> EncodedAnswer:
        """Split a sequence at the end of the prompt."""
        eos = self.tokenizer.eos_token_id
        if offsets is None:
            prompt = self._tokenise([text[:boundary]])[0][0]
            first, last = _common(prompt, ids), len(ids)
        else:
            inside = [i for i, (_, end) in enumerate(offsets) if end > boundary]
            first, last = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))
        answer_ids = ids[first:last]
        if offsets is None:
            texts = [self.tokenizer.decode([i]) for i in answer_ids]
            places = [(-1, -1)] * len(answer_ids)
        else:
            texts, places = (
                _texts(text, boundary, offsets[first:last]),
                _places(offsets[first:last], start, len(answer)),
            )
        if not self.chat and eos is not None and (not answer_ids or answer_ids[-1] != eos):
            answer_ids, texts = [*answer_ids, eos], [*texts, self.tokenizer.convert_ids_to_tokens(eos)]
            places = [*places, (-1, -1)]
        if not answer_ids:
            raise ScoreError(f"{where}: the tokenizer makes no token of it")
        if not first:
            raise ScoreError(f"{where}: nothing stands before it, not even a beginning-of-sequence token")
        return EncodedAnswer(ids[:first], answer_ids, texts, places)

    def _fit(self, where: str, encoded: EncodedAnswer, longest: int) -> EncodedAnswer:
        """Cut to the length asked for; refuse what the model cannot take."""
        if self.max_length is None:
            if self.limit is not None and encoded.length > self.limit:
                raise ScoreError(
                    f"{where}: {len(encoded.prompt)} tokens of prompt and {len(encoded.ids)} of the answer are more"
                    f" than the {self.limit} that the model takes; --max-length {self.limit} cuts such sequences"
                )
            return encoded
        for_prompt, for_answer = kept_lengths(longest, self.max_length)
        cut_prompt = max(0, len(encoded.prompt) - for_prompt)
        prompt = encoded.prompt[cut_prompt:]
        for_answer = self.max_length - len(prompt)
        cut_answer = max(0, len(encoded.ids) - for_answer)
        if not for_answer:
            raise ScoreError(f"{where}: --max-length {self.max_length} leaves no room for it")
        return EncodedAnswer(
            prompt,
            encoded.ids[:for_answer],
            encoded.texts[:for_answer],
            encoded.offsets[:for_answer],
            cut_prompt,
            cut_answer,
        )


def place(number: int) -> str:
    """How messages name a pair: its number in the results, and its place in the data."""
    return f"pair {number} (record {number + 1} of the data)"


def _common(prefix: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), min(len(prefix), len(whole))
    )


def _texts(text: str, boundary: int, offsets: list[tuple[int, int]]) -> list[str]:
    """The rendered answer cut at the ends of its tokens, so that the pieces are the whole."""
    pieces, position = [], boundary
    for i, (_, end) in enumerate(offsets):
        end = len(text) if i == len(offsets) - 1 else max(end, position)
        pieces.append(text[position:end])
        position = end
    return pieces


def _places(offsets: list[tuple[int, int]], start: int, length: int) -> list[tuple[int, int]]:
    """Offsets in the answer from those in the rendered text, the answer's characters alone."""
    places = []
    for a, b in offsets:
        a, b = max(a - start, 0), min(b - start, length)
        places.append((a, b) if a < b else (-1, -1))
    return places


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(ids[:3])))) or "nothing"
