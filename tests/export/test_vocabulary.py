"""Tokenizers of the kinds in use, through a GGUF file and back."""

from __future__ import annotations

import io

import gguf
import pytest
import sentencepiece
from test_gguf_export import SHAPE, build, write
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from rlhf.errors import RecipeError
from rlhf.export.agreement import PROBES
from rlhf.export.readback import check_gguf
from rlhf.models.tiny import CHATML

CORPUS = [
    *PROBES,
    "The quick brown fox jumps over the lazy dog, again and again; I've seen it 12345 times in 2024.",
    "今天天气很好，我们去公园散步吧。人工智能和机器学习。",
    "Привет, мир! Καλημέρα κόσμε. Ça va très bien.",
    "    indented\n\n\n   lines\t\ttabs  'RE 'Ve don't they'll",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(split, normalizer=None):
    """Train a byte-level BPE whose merges depend on how text is split."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def splitting(name):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


def through_gguf(tokenizer, tmp_path):
    """Return the metadata of a file that was read back with the same tokens."""
    size = max(tokenizer.get_vocab().values()) + 1
    config = LlamaConfig(**SHAPE | {"vocab_size": size, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None})
    folder = build(config, tmp_path / "model", tokenizer=tokenizer)
    file = write(folder, tmp_path / "m.gguf", "f32")
    assert check_gguf(file, folder, "f32").exact
    fields = gguf.GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("gpt-2", lambda: byte_level(GPT2)),
        ("llama-bpe", lambda: byte_level(splitting("llama-bpe"))),
        ("qwen2", lambda: byte_level(splitting("qwen2"), normalizers.NFC())),
        ("tekken", lambda: byte_level(splitting("tekken"))),
    ],
)
def test_the_way_to_split_text_is_found_by_what_it_does(name, tokenizer, tmp_path):
    said = through_gguf(tokenizer(), tmp_path)
    assert said["tokenizer.ggml.pre"] == name
    types = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert types["<|im_end|>"] == gguf.TokenType.CONTROL
    assert types["<think>"] == gguf.TokenType.USER_DEFINED


def test_digits_on_their_own_have_a_name_too(tmp_path):
    said = through_gguf(byte_level(SMOLLM), tmp_path)
    assert said["tokenizer.ggml.pre"] in ("gpt-2", "smollm")


def test_an_unknown_way_to_split_is_refused(tmp_path):
    odd = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[aeiou]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(RecipeError, match="splits text in a way that GGUF export has no name for"):
        through_gguf(byte_level(odd), tmp_path)


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"<|im_end|>": 0, "a": 1, "<|im_start|>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="a", chat_template=CHATML
    )
    with pytest.raises(RecipeError, match="its tokenizer is WordLevel"):
        through_gguf(tokenizer, tmp_path)


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece BPE with byte fallback: pieces and their scores."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=520,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]


def test_sentencepiece_comes_back_with_scores_for_its_merges(pieces, tmp_path):
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges = generate_merges(vocabulary, dict(pieces))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, chat_template=CHATML.replace("<|im_end|>", "</s>"))
    said = through_gguf(tokenizer, tmp_path)
    assert said["tokenizer.ggml.model"] == "llama"
    assert said["tokenizer.ggml.add_bos_token"] == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert said["tokenizer.ggml.add_space_prefix"] is True
    types = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert types["<0x0A>"] == gguf.TokenType.BYTE
    assert types["</s>"] == gguf.TokenType.CONTROL
    scores = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    merged = list(dict.fromkeys(left + right for left, right in merges))
    assert sorted(merged, key=lambda piece: -scores[piece]) == merged
