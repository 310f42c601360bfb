"""A small Llama with a tokenizer, saved as checkpoints are: a configuration, shards, a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards box"
CHAT = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<bot>"
SPECIAL = ["<s>", "</s>", "<user>", "<bot>"]


def tokenizer_of_bytes(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A token for each byte, so that it knows every text; and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.chat_template = CHAT if chat else None
    return fast


def save_checkpoint(folder: Path, *, chat: bool = True, **changes: Any) -> Any:
    """Write a checkpoint in several shards; the model, in fp32 with eager attention."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of_bytes(chat=chat)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    config = LlamaConfig(**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return model
