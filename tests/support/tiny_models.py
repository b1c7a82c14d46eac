"""Tiny language models and tokenizers of transformers, made in code in milliseconds; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from qkernels.demo.tokenizer import train_tokenizer


def tokenizer(texts: Sequence[str], vocabulary_size: int = 400) -> PreTrainedTokenizerBase:
    """Byte-level BPE with the demo's chat template; the texts' words become tokens."""
    return train_tokenizer(texts, vocabulary_size)


def llama(vocabulary: int, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """One layer, width 16; weights so large that it is sure of something and its hidden states tell texts apart."""
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()
