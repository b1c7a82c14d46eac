"""From preference pairs to token ids with the tokenizer of any model: prompt formats, offsets of tokens, cuts.

The prompt and an answer are rendered and tokenised as one text, as in training; a token that reaches over the end of
the prompt belongs to the answer. Of a trajectory, an answer of several turns, only what the assistant said is scored.

What the assistant said is told by rendering: its turn is what the template adds when the conversation grows by that
turn, after the marks that begin an answer. A template that writes earlier turns otherwise once others follow has to say
itself what the assistant's words are, with `{% generation %}` marks; without them such a conversation is refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data import Preference
from ..records.pairs import spoken_places
from ..text.between import Between, first, separated
from ..text.characters import first_line
from ..text.lengths import kept_lengths
from .options import ScoreError

FORMATS = ("auto", "chat", "plain")
_END = sys.maxsize  # of a part that goes to the end of the text
_NOWHERE = -sys.maxsize // 2  # of words that the template does not write
_STATEMENT = re.compile(r"{%[-+]?\s*(\w+)")


class EncodedAnswer(NamedTuple):
    """Token ids of one answer, what is read before it, and where its tokens stand in the text.

    prompt, ids: token ids; `ids` with what ends the answer (end token, the template's closing marks).
    texts: one per token of `ids`; joined, they are the rendered answer. A token that continues a character begun by the
        one before is "".
    offsets: characters `[start, end)` of the answer as the data has it; (-1, -1) for tokens outside it.
    cut_prompt, cut_answer: tokens that were cut off.
    between: of a trajectory, the tokens that are read and not scored, such as what a tool returned: groups (number of
        the token of `ids` that follows, token ids). `offsets` are those in the assistant's words, joined.
    """

    prompt: list[int]
    ids: list[int]
    texts: list[str]
    offsets: list[tuple[int, int]]
    cut_prompt: int = 0
    cut_answer: int = 0
    between: Between = ()

    @property
    def answer_length(self) -> int:
        """Tokens of the answer, scored or not."""
        return len(self.ids) + sum(len(group) for _, group in self.between)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + self.answer_length


class _Rendered(NamedTuple):
    """The text of a prompt and its answer.

    text: all of it.
    boundary: where the answer's part begins.
    said: parts of the text that the assistant said and what is at their ends: (begin, end, begin of its words in the
        text, length of its words, begin of its words in the answer). One part that goes to the end for a single answer.
    is_scored: of each token, whether the assistant said it, as the template's own marks tell it; None where `said`
        does.
    """

    text: str
    boundary: int
    said: list[tuple[int, int, int, int, int]]
    is_scored: list[bool] | None = None


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

    def refuse_conversation(self, number: int, pair: Preference) -> None:
        """Raise ScoreError for a pair that cannot be written without a chat template, where there is none."""
        for side in ("chosen", "rejected") if not self.chat else ():
            count = len(pair.prompt) + len(pair.turns(side)) - 1
            if count > 1 or pair.turns(side)[0].more:
                what = "its prompt is" if count == len(pair.prompt) else "with its answer it is"
                raise ScoreError(
                    f"{place(number)}, {side} answer: {what} a conversation of {count} messages, which the plain format"
                    " cannot write; use a tokenizer with a chat template, or give one with --chat-template"
                )

    def pairs(self, pairs: Mapping[int, Preference]) -> list[tuple[EncodedAnswer, EncodedAnswer]]:
        """Encode the answers of pairs, chosen and rejected, all at once.

        Args:
            pairs: by their numbers, which messages name.

        Raises:
            ScoreError: a pair that cannot be rendered, or does not fit the model; names it.
        """
        sides = [
            (f"{place(number)}, {side} answer", pair, side)
            for number, pair in pairs.items()
            for side in ("chosen", "rejected")
        ]
        for number, pair in pairs.items():
            self.refuse_conversation(number, pair)
        rendered = [self._render(*side) for side in sides]
        texts = [one.text for one in rendered]
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
            self._answer(where, one, *tokens)
            for (where, _, _), one, tokens in zip(sides, rendered, encoded, strict=True)
        ]
        fitted = []
        for number, chosen, rejected in zip(pairs, answers[::2], answers[1::2], strict=True):
            longest = max(chosen.answer_length, rejected.answer_length)
            fitted.append(
                (
                    self._fit(f"{place(number)}, chosen answer", chosen, longest),
                    self._fit(f"{place(number)}, rejected answer", rejected, longest),
                )
            )
        return fitted

    def _render(self, where: str, pair: Preference, side: str) -> _Rendered:
        """The whole text and what of it is the answer."""
        answer = getattr(pair, side)
        if not self.chat:
            text = pair.prompt[0].content
            return _Rendered(text + answer, len(text), [(len(text), _END, len(text), len(answer), 0)])
        if pair.chosen_turns:
            return self._trajectory(where, pair, side)
        messages = [message.fields() for message in pair.prompt]
        before = self._chat(where, pair, messages, True)
        whole = self._chat(where, pair, [*messages, {"role": "assistant", "content": answer}])
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
        start = start if start >= 0 else -len(whole) - len(answer)
        return _Rendered(whole, boundary, [(boundary, _END, start, len(answer), 0)])

    def _chat(self, where: str, pair: Preference, messages: list[dict[str, Any]], to_answer: bool = False) -> str:
        """A conversation as the template writes it, up to the marks that begin an answer if asked for."""
        more: dict[str, Any] = {"tools": json.loads(pair.tools)} if pair.tools else {}
        if to_answer:
            more["add_generation_prompt"] = True
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except Exception as error:  # jinja2's errors, and whatever a template raises
            raise ScoreError(f"{where}: the chat template refuses the conversation ({first_line(error)})") from error

    def _trajectory(self, where: str, pair: Preference, side: str) -> _Rendered:
        """An answer of several turns: each of the assistant's turns is what the template adds with it."""
        turns = pair.turns(side)
        messages = [message.fields() for message in (*pair.prompt, *turns)]
        whole = self._chat(where, pair, messages)
        marked = "generation" in _marks(self.tokenizer.chat_template)
        said: list[tuple[int, int, int, int, int]] = []
        for i, (message, begin) in enumerate(zip(turns, spoken_places(turns), strict=True)):
            if message.role != "assistant":
                continue
            count = len(pair.prompt) + i
            before, after = (
                self._chat(where, pair, messages[:count], True),
                self._chat(where, pair, messages[: count + 1]),
            )
            if not (after.startswith(before) and whole.startswith(after)):
                if marked:
                    break
                raise ScoreError(
                    f"{where}: it has several turns, and the chat template writes message {count + 1} of the"
                    " conversation otherwise once more follow, so that the assistant's words in it cannot be told from"
                    " the rest; give a template that does not, or one with {% generation %} marks, with"
                    " --chat-template"
                )
            start = whole.find(message.content, len(before), len(after)) if message.content.strip() else -1
            if start < 0:  # stripped, or not written at all
                start = whole.find(message.content.strip(), len(before), len(after)) if message.content.strip() else -1
                start = _NOWHERE if start < 0 else start - len(message.content) + len(message.content.lstrip())
            said.append((len(before), len(after), start, len(message.content), begin))
        if not marked:
            return _Rendered(whole, said[0][0], said)
        if len(said) < sum(message.role == "assistant" for message in turns):
            said = []
        return self._marked(where, pair, messages, _Rendered(whole, 0, said))

    def _marked(self, where: str, pair: Preference, messages: list[dict[str, Any]], rendered: _Rendered) -> _Rendered:
        """The same where the template's own marks tell what the assistant says."""
        more: dict[str, Any] = {"tools": json.loads(pair.tools)} if pair.tools else {}
        masked = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **more
        )
        before = self._chat(where, pair, messages[: len(pair.prompt)], True)
        boundary = _common(before, rendered.text)
        is_scored = [bool(flag) for flag in masked["assistant_masks"]]
        if not any(is_scored):
            raise ScoreError(f"{where}: the {{% generation %}} marks of the chat template mark no word of it")
        return _Rendered(rendered.text, boundary, rendered.said, is_scored)

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
        self, where: str, rendered: _Rendered, ids: list[int], offsets: list[tuple[int, int]] | None
    ) -> EncodedAnswer:
        """Split a sequence at the end of the prompt, and its answer into what is scored and what is not."""
        text, boundary = rendered.text, rendered.boundary
        eos = self.tokenizer.eos_token_id
        if offsets is None:
            if len(rendered.said) != 1 or rendered.said[0][1] != _END:
                raise ScoreError(
                    f"{where}: it has several turns, and this tokenizer does not tell where its tokens stand in the"
                    " text; use a fast one (tokenizer.json)"
                )
            prompt = self._tokenise([text[:boundary]])[0][0]
            start, last = _common(prompt, ids), len(ids)
        else:
            inside = [i for i, (_, end) in enumerate(offsets) if end > boundary]
            start, last = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))
        if rendered.is_scored is not None:
            scored = rendered.is_scored[start:last]
        elif offsets is None or rendered.said[-1][1] == _END:
            scored = [True] * (last - start)
        else:
            scored = [_part_of(span, rendered.said) is not None for span in offsets[start:last]]
        between: Between = ()
        answer_ids = ids[start:last]
        if offsets is None:
            texts = [self.tokenizer.decode([i]) for i in answer_ids]
            places = [(-1, -1)] * len(answer_ids)
        else:
            texts, places = (
                _texts(text, boundary, offsets[start:last]),
                [_place(span, rendered.said) for span in offsets[start:last]],
            )
        if not all(scored):
            texts = [one for one, is_scored in zip(texts, scored, strict=True) if is_scored]
            places = [one for one, is_scored in zip(places, scored, strict=True) if is_scored]
            answer_ids, between = separated(answer_ids, scored)
        if not self.chat and eos is not None and (not answer_ids or answer_ids[-1] != eos):
            answer_ids, texts = [*answer_ids, eos], [*texts, self.tokenizer.convert_ids_to_tokens(eos)]
            places = [*places, (-1, -1)]
        if not answer_ids:
            raise ScoreError(f"{where}: the tokenizer makes no token of it")
        if not start:
            raise ScoreError(f"{where}: nothing stands before it, not even a beginning-of-sequence token")
        return EncodedAnswer(ids[:start], answer_ids, texts, places, between=between)

    def _fit(self, where: str, encoded: EncodedAnswer, longest: int) -> EncodedAnswer:
        """Cut to the length asked for; refuse what the model cannot take."""
        if self.max_length is None:
            if self.limit is not None and encoded.length > self.limit:
                raise ScoreError(
                    f"{where}: {len(encoded.prompt)} tokens of prompt and {encoded.answer_length} of the answer are"
                    f" more than the {self.limit} that the model takes; --max-length {self.limit} cuts such sequences"
                )
            return encoded
        for_prompt, for_answer = kept_lengths(longest, self.max_length)
        cut_prompt = max(0, len(encoded.prompt) - for_prompt)
        prompt = encoded.prompt[cut_prompt:]
        for_answer = self.max_length - len(prompt)
        kept, between = first(encoded.ids, encoded.between, for_answer)
        cut_answer = max(0, encoded.answer_length - for_answer)
        if not kept:
            raise ScoreError(f"{where}: --max-length {self.max_length} leaves no room for it")
        return EncodedAnswer(
            prompt,
            encoded.ids[:kept],
            encoded.texts[:kept],
            encoded.offsets[:kept],
            cut_prompt,
            cut_answer,
            between,
        )


def place(number: int) -> str:
    """How messages name a pair: its number in the results, and its place in the data."""
    return f"pair {number} (record {number + 1} of the data)"


def _common(prefix: Sequence[Any], whole: Sequence[Any]) -> int:
    """How many tokens (or characters) two sequences begin with alike."""
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


def _part_of(span: tuple[int, int], said: Sequence[tuple[int, int, int, int, int]]) -> int | None:
    """Which part a token belongs to; one that reaches over the beginning of a part belongs to it."""
    return next((i for i, (begin, end, *_) in enumerate(said) if span[1] > begin and span[0] < end), None)


def _place(span: tuple[int, int], said: Sequence[tuple[int, int, int, int, int]]) -> tuple[int, int]:
    """Offsets in the answer from those in the rendered text, the answer's characters alone."""
    part = _part_of(span, said)
    if part is None:
        return -1, -1
    _, _, start, length, begin = said[part]
    a, b = max(span[0] - start, 0), min(span[1] - start, length)
    return (a + begin, b + begin) if a < b else (-1, -1)


def _marks(template: Any) -> set[str]:
    """The names of the statements of a Jinja template; of several templates, of all of them."""
    texts = template.values() if isinstance(template, dict) else [template]
    return {name for text in texts for name in _STATEMENT.findall(str(text))}


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return ", ".join(map(repr, tokenizer.convert_ids_to_tokens(list(ids[:3])))) or "nothing"
