"""The demo's tokenizer: byte-level BPE trained on the data, with a chat layout that is its chat template.

A conversation is a role token, the text and an end token per message, then the answer's role token:

    <|user|>Tell me about Peru.<|end|><|assistant|>Its capital is Lima.<|end|>
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data import Message

PAD, END = "<|pad|>", "<|end|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """Train byte-level BPE, so that every text can be written, on `texts`.

    Args:
        texts: what to learn the merges from.
        vocabulary_size: the most tokens it may have, the 256 bytes and the special tokens included.
    """
    special = [PAD, END, *ROLE_TOKENS.values()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=list(ROLE_TOKENS.values()),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


class EncodedText(NamedTuple):
    """Token ids of a text and the characters `[start, end)` that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[EncodedText]:
    """Tokenise texts all at once; a special token such as "<|end|>" that occurs in one is just text."""
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    columns = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [EncodedText(list(ids), [(start, end) for start, end in offsets]) for ids, offsets in columns]


def message_text(message: Message) -> str:
    """What a message says; of one that calls tools, the calls too."""
    return message.content + ("\n" if message.content and message.more else "") + message.more


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Token ids of conversations up to and including the role token of the answer."""
    roles = {role: token_id(tokenizer, token) for role, token in ROLE_TOKENS.items()}
    end = token_id(tokenizer, END)
    encoded = iter(encode_texts(tokenizer, [message_text(message) for messages in prompts for message in messages]))
    result = []
    for messages in prompts:
        ids = [token for message in messages for token in (roles[message.role], *next(encoded).ids, end)]
        result.append([*ids, roles["assistant"]])
    return result


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of what follows a prompt, up to its last end token, and which of them the assistant wrote.

    Those are its texts with their end tokens; the role token before each is given to it.
    """
    roles = {role: token_id(tokenizer, token) for role, token in ROLE_TOKENS.items()}
    end = token_id(tokenizer, END)
    ids: list[int] = []
    written: list[bool] = []
    for i, (message, text) in enumerate(
        zip(turns, encode_texts(tokenizer, [message_text(message) for message in turns]), strict=True)
    ):
        if i:  # the first role token ends the prompt
            ids, written = [*ids, roles[message.role]], [*written, False]
        ids += [*text.ids, end]
        written += [message.role == "assistant"] * (len(text.ids) + 1)
    return ids, written


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as text for display; bytes that are not a character on their own as "<F0><9F>"."""
    special = set(tokenizer.all_special_ids)
    texts = []
    for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if token_id in special:
            texts.append(token)
            continue
        raw = bytes(_BYTE_OF[character] for character in token)
        try:
            texts.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append("".join(f"<{byte:02X}>" for byte in raw))
    return texts


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one special token."""
    return int(tokenizer.get_vocab()[token])


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE (GPT-2): printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
