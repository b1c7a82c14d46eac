"""The demo's tokenizer: byte-level BPE trained on the data, with a chat layout that is its chat template.

A conversation is a role token, the text and an end token per message, then the answer's role token:

    <|user|>Tell me about Peru.<|end|><|assistant|>Its capital is Lima.<|end|>
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and the characters `[start, end)` of each; "<|end|>" in the text is just text."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to and including the role token of the answer."""
    ids: list[int] = []
    for message in messages:
        ids.append(token_id(tokenizer, ROLE_TOKENS[message.role]))
        ids += encode_text(tokenizer, message.content)[0]
        ids.append(token_id(tokenizer, END))
    return [*ids, token_id(tokenizer, ROLE_TOKENS["assistant"])]


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
