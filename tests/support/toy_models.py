"""Language models of transformers that a test can see through: tiny random Llamas, and one that is a table."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from qkernels.tabular import TabularMDP

PAD, END = 0, 1


def llama(seed: int, vocab: int = 13, layers: int = 2, end: int | None = END, **config) -> LlamaForCausalLM:
    """A random Llama with opinions: its initial weights are large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {
            "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5, "pad_token_id": PAD,
            "eos_token_id": end, "bos_token_id": None, "attn_implementation": "eager", "max_position_embeddings": 64,
        }  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**{**options, **config})).eval()


def gpt2(seed: int, vocab: int = 13) -> GPT2LMHeadModel:
    """A random GPT-2, to which a token's absolute position matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5,
            pad_token_id=PAD, eos_token_id=END, bos_token_id=None, attn_implementation="eager",
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def next_logps(model: nn.Module, ids: list[int]) -> Tensor:
    """log pi of the next token, `[V]` float64, by a full forward of one sequence without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)


class TabularConfig(PretrainedConfig):
    model_type = "tabular"

    def __init__(self, vocab_size: int = 4, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, vocab_size, 1
        super().__init__(**kwargs)


class TabularLM(PreTrainedModel, GenerationMixin):
    """The tables of a solved MDP as a language model: the prompt is one token, id `vocab`, which never comes again."""

    config_class = TabularConfig

    def __init__(self, tables: tuple[Tensor, ...]):
        vocab = tables[0].shape[1]
        super().__init__(TabularConfig(vocab + 1, pad_token_id=vocab, eos_token_id=None, bos_token_id=vocab))
        self.tables, self.vocab = tables, vocab
        self.lm_head = nn.Linear(vocab + 1, vocab + 1, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(vocab + 1))
        self.eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask=None, **kwargs) -> CausalLMOutput:
        hidden = torch.full((*input_ids.shape, self.vocab + 1), -1e9)  # the head is the identity
        state = torch.zeros(len(input_ids), dtype=torch.int64)
        for t in range(min(input_ids.shape[1], len(self.tables))):
            if t:
                state = state * self.vocab + input_ids[:, t].clamp(max=self.vocab - 1)
            hidden[:, t, : self.vocab] = self.tables[t][state].float()
        return CausalLMOutput(logits=self.lm_head(hidden))


def tabular_models(mdp: TabularMDP) -> tuple[TabularLM, TabularLM]:
    """The optimal policy and the reference."""
    return TabularLM(mdp.logits), TabularLM(mdp.reference_logps)
