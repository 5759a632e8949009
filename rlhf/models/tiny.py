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


def build_tiny(
    folder: Path,
    seed: int = 0,
    *,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    tied: bool = True,
    vocabulary: int | None = None,
    positions: int = 512,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random Llama, by default of about 91k weights, with its tokenizer to `folder` and return it.

    Heads are `hidden // heads` wide; 32 is the least that vLLM runs on CPU. `tied`: the output layer is the
    embedding. A `vocabulary` above the tokenizer's leaves entries that no text has. The same arguments give the same
    weights.
    """
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=TURN_END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
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
