"""Tiny random models, a tokenizer and preference data for the tests of the integrations; nothing is downloaded."""

from __future__ import annotations

import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1,
}  # fmt: skip
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

# Families whose heads differ: softcap, scale, bias, tied weights, something before the head, no attention. What a
# configuration says and the model does not do (mpt, minicpm3's division happens before the head) is among them.
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "gemma3": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 4},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
                  "mamba_d_state": 8},
    "minicpm3": {"dim_model_base": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                 "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "logit_scale": 0.5},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    "hyperclovax": {"logits_scaling": 0.5},
}  # fmt: skip


def model(family: str = "llama", *, seed: int = 0, train: bool = False, **options) -> torch.nn.Module:
    """A random model in fp32 whose logits spread over several nats."""
    torch.manual_seed(seed)
    options = {**FAMILIES[family], **options}
    if family == "gemma3":  # a vision-language model
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        config = Gemma3Config(text_config={**_SIZES, **options}, vision_config=vision)
        made = Gemma3ForConditionalGeneration(config)
    else:
        config = AutoConfig.for_model(family, **(options if "n_embd" in options else {**_SIZES, **options}))
        made = AutoModelForCausalLM.from_config(config)
    made = made.float()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
        bias = made.get_output_embeddings().bias
        if bias is not None:
            bias.normal_()
    return made.train(train)


def batch(rows: int = 3, length: int = 12, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and attention mask; the second row is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, length - 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tokenizer(first: str = "w0"):
    """One token for each word w0 ... w93; `first` may stand for w0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", first] + [f"w{i}" for i in range(1, VOCAB - 3)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def preferences(pairs: int = 12, *, weights: bool = False, seed: int = 0) -> list[dict]:
    """Random pairs; with `weights`, a number for each token of both answers, some of them 0."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(VOCAB - 3)}" for _ in range(draw.randint(low, high)))

    data = [{"prompt": words(3, 9), "chosen": " " + words(2, 8), "rejected": " " + words(2, 8)} for _ in range(pairs)]
    if weights:
        for pair in data:
            for side in ("chosen", "rejected"):
                count = len(pair[side].split()) + 1  # the end-of-sequence token
                pair[f"{side}_token_weights"] = [draw.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(count)]
    return data


# --- pictures ------------------------------------------------------------------------------------------------------

_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
)


def vision_model(seed: int = 0) -> torch.nn.Module:
    """A Llava that sees 28 x 28 pixels as 4 tokens."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **_SIZES}, image_token_id=3)
    made = LlavaForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def vision_processor():
    """The tokenizer, with token 3 for pictures, and what makes pixels of them."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    words = tokenizer("<image>")
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})  # also without spaces around it
    return LlavaProcessor(
        pixels, words, patch_size=14, vision_feature_select_strategy="default", chat_template=_CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip


def vision_preferences(pairs: int = 8) -> list[dict]:
    """The pairs of `preferences`, as conversations about a picture of noise."""
    from PIL import Image

    data = []
    for number, pair in enumerate(preferences(pairs)):
        noise = torch.randint(0, 255, (28, 28, 3), generator=torch.Generator().manual_seed(number))
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        data.append({
            "images": [Image.fromarray(noise.to(torch.uint8).numpy())],
            **{name: [{"role": role, "content": pair[name].strip()}] for name, role in roles.items()},
        })  # fmt: skip
    return data
