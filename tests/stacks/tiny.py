"""A tiny model with a tokenizer that vLLM's CPU kernels can run, and what the chains of the tests are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 512
BLOCK = 32  # tokens of a block of vLLM's KV cache on a CPU
EOS = list(range(2, 18))  # so many that answers end


def save(folder: Path, layers: int = 2, vocab: int = VOCAB) -> str:
    """A Llama whose rows are neither flat nor nearly deterministic; heads of 32, the smallest vLLM has on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer(vocab).save_pretrained(folder)
    return str(folder)


def tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """Token i is a number between two of eight letters, so that pairs of letters straddle tokens."""
    names = [f"{'abcdefgh'[i % 8]}{i // 64}{'abcdefgh'[i // 8 % 8]}" for i in range(vocab)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def prompts(count: int) -> list[list[int]]:
    """Of different lengths, on both sides of a block's end."""
    return [np.random.default_rng(i).integers(20, VOCAB, 40 + 7 * i).tolist() for i in range(count)]
