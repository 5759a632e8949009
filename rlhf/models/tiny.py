"""A random Llama with a byte-level tokenizer, built in code: for tests and smoke recipes (`tiny://llama`)."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|im_end|>", "<|im_start|>", "<|unknown|>", "<|reserved|>")
PAD, BEGIN, TURN_END, TURN_START, UNKNOWN, RESERVED = range(len(SPECIAL_TOKENS))
FIRST_BYTE = len(SPECIAL_TOKENS)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tiny(folder: Path, seed: int = 0) -> Path:
    """Write a random Llama of about 91k float32 weights with its tokenizer to `folder` and return it.

    Hidden size 64, 2 layers, 2 heads of 32 (the smallest that vLLM runs on CPU), 1 key-value head, tied
    embeddings, at most 512 positions. The same seed gives the same weights.
    """
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=TURN_END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 262 entries: six special tokens, then byte `b` as id `6 + b`; ChatML template."""
    special = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    alphabet = {char: FIRST_BYTE + byte for byte, char in bytes_to_unicode().items()}
    backend = Tokenizer(BPE(vocab=special | alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[PAD],
        bos_token=SPECIAL_TOKENS[BEGIN],
        eos_token=SPECIAL_TOKENS[TURN_END],
        unk_token=SPECIAL_TOKENS[UNKNOWN],
        extra_special_tokens=[SPECIAL_TOKENS[TURN_START], SPECIAL_TOKENS[RESERVED]],
        chat_template=CHATML,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
