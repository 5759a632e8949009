"""Chat tokens and masks, worked by hand with the byte tokenizer (id of a byte: 6 + its value)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf.errors import DataError, RecipeError
from rlhf.models.tokenizer import ChatTokenizer, load_tokenizer

END, START = 2, 3
TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "!"},
]


def raw(text: str) -> list[int]:
    return [6 + byte for byte in text.encode()]


def variant(source: Path, target: Path, template: str | None = None, **tokenizer_config: object) -> Path:
    """A copy of a folder with another template (none for "") and other entries in tokenizer_config.json."""
    shutil.copytree(source, target)
    if template is not None:
        (target / "chat_template.jinja").unlink()
        if template:
            (target / "chat_template.jinja").write_text(template)
    settings = json.loads((target / "tokenizer_config.json").read_text()) | tokenizer_config
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def test_prompt_has_the_generation_prompt_and_no_begin_token(tiny_tokenizer: ChatTokenizer) -> None:
    assert tiny_tokenizer.prompt_ids(TWO_TURNS[:1]) == [
        *[START, *raw("user\nHi"), END, *raw("\n")],
        *[START, *raw("assistant\n")],
    ]


def test_two_turn_mask_by_hand(tiny_tokenizer: ChatTokenizer) -> None:
    ids, mask = tiny_tokenizer.conversation_ids(TWO_TURNS)
    expected = [
        ([START, *raw("user\nHi"), END, *raw("\n"), START, *raw("assistant\n")], False),
        ([*raw("Yo"), END], True),
        ([*raw("\n"), START, *raw("user\n?"), END, *raw("\n"), START, *raw("assistant\n")], False),
        ([*raw("!"), END], True),
        (raw("\n"), False),
    ]
    assert ids == [token for piece, _ in expected for token in piece]
    assert mask == [spoken for piece, spoken in expected for _ in piece]
    assert sum(mask) == 5


@pytest.mark.parametrize("content", ["Yo", "\nleading newline", "", " both \n\n", "no. <|im_end|> yes"])
def test_prompt_is_a_prefix_of_the_conversation(tiny_tokenizer: ChatTokenizer, content: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    prompt = tiny_tokenizer.prompt_ids(messages[:1])
    ids, mask = tiny_tokenizer.conversation_ids(messages)
    assert ids[: len(prompt)] == prompt
    assert not any(mask[: len(prompt)])
    completion = tiny_tokenizer.completion_ids(messages[:1], content)
    assert completion == (prompt, [token for token, spoken in zip(ids, mask, strict=True) if spoken])


def test_conversation_that_ends_with_the_user_keeps_its_last_turn_unmasked(tiny_tokenizer: ChatTokenizer) -> None:
    ids, mask = tiny_tokenizer.conversation_ids(TWO_TURNS[:3])
    assert ids[-len(raw("user\n?")) - 3 :] == [START, *raw("user\n?"), END, *raw("\n")]
    assert sum(mask) == len("Yo") + 1


def test_completion_ends_with_end_of_sequence_and_decodes_to_the_text(tiny_tokenizer: ChatTokenizer) -> None:
    prompt, completion = tiny_tokenizer.completion_ids(TWO_TURNS[:1], "Grüezi ")
    assert prompt == tiny_tokenizer.prompt_ids(TWO_TURNS[:1])
    assert completion == [*raw("Grüezi "), END]
    assert tiny_tokenizer.decode(completion) == "Grüezi "


def test_template_that_writes_a_begin_token_gives_exactly_one(tiny_folder: Path, tmp_path: Path) -> None:
    template = "{{ bos_token }}" + (tiny_folder / "chat_template.jinja").read_text()
    tokenizer = load_tokenizer(variant(tiny_folder, tmp_path / "bos", template))
    ids, _ = tokenizer.conversation_ids(TWO_TURNS)
    assert tokenizer.prompt_ids(TWO_TURNS[:1])[:2] == [1, START]
    assert ids.count(1) == 1


def test_template_that_rewrites_history_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = load_tokenizer(variant(tiny_folder, tmp_path / "rewriting", template))
    tokenizer.conversation_ids(TWO_TURNS[:2])
    with pytest.raises(DataError, match="changes earlier turns"):
        tokenizer.conversation_ids(TWO_TURNS)


def test_template_that_refuses_roles_says_which(tiny_folder: Path, tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + (tiny_folder / "chat_template.jinja").read_text()
    )
    tokenizer = load_tokenizer(variant(tiny_folder, tmp_path / "refusing", template))
    with pytest.raises(DataError, match=r"roles system, user: no system role"):
        tokenizer.prompt_ids([{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}])


def test_conversation_needs_something_to_answer(tiny_tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="nothing to answer"):
        tiny_tokenizer.conversation_ids([{"role": "assistant", "content": "Yo"}])
    with pytest.raises(DataError, match="is empty"):
        tiny_tokenizer.prompt_ids([])


def test_no_template_and_no_end_token_are_recipe_errors(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"set model\.chat_template"):
        load_tokenizer(variant(tiny_folder, tmp_path / "bare", template=""))
    endless = variant(tiny_folder, tmp_path / "endless", eos_token=None)
    (endless / "generation_config.json").unlink()
    with pytest.raises(RecipeError, match="no end-of-sequence token"):
        load_tokenizer(endless)


def test_template_that_never_ends_a_turn_is_a_recipe_error(tiny_folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    with pytest.raises(RecipeError, match=r"closes the assistant's turn .* none of <\|im_end\|>"):
        load_tokenizer(variant(tiny_folder, tmp_path / "open", template))


def test_end_tokens_of_the_generation_config_count_and_the_closing_one_is_first(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = variant(tiny_folder, tmp_path / "two_ends", eos_token="<|reserved|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    assert load_tokenizer(folder).eos_ids == (2, 5, 4)


@pytest.mark.parametrize(("pad", "expected"), [("<|pad|>", 0), (None, 0), ("<|im_end|>", 0), ("<|reserved|>", 5)])
def test_pad_never_is_the_end_while_another_token_is_free(
    tiny_folder: Path, tmp_path: Path, pad: str | None, expected: int
) -> None:
    tokenizer = load_tokenizer(variant(tiny_folder, tmp_path / "padded", pad_token=pad))
    assert tokenizer.pad_id == expected
    assert tokenizer.hf.pad_token_id == expected


def test_fingerprint_follows_vocabulary_and_template(tiny_folder: Path, tmp_path: Path) -> None:
    first = load_tokenizer(tiny_folder)
    assert load_tokenizer(variant(tiny_folder, tmp_path / "same")).fingerprint() == first.fingerprint()
    template = "{{ bos_token }}" + (tiny_folder / "chat_template.jinja").read_text()
    assert load_tokenizer(variant(tiny_folder, tmp_path / "other", template)).fingerprint() != first.fingerprint()


@pytest.mark.real_model
def test_real_tokenizer_splits_where_the_model_sees_a_boundary(real_folder: Path) -> None:
    tokenizer = load_tokenizer(real_folder)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.pad_id == tokenizer.hf.convert_tokens_to_ids("<|endoftext|>")
    for content in ["Paris.", "\n\nParis.", "  Paris", "1234"]:
        messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": content}]
        prompt = tokenizer.prompt_ids(messages[:1])
        ids, mask = tokenizer.conversation_ids(messages)
        assert ids[: len(prompt)] == prompt
        spoken = [token for token, said in zip(ids, mask, strict=True) if said]
        assert spoken[-1] == 2
        assert tokenizer.decode(spoken) == content
        assert tokenizer.completion_ids(messages[:1], content) == (prompt, spoken)
    plain = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Paris."}]
    whole = tokenizer.hf.apply_chat_template(plain, tokenize=True, return_dict=True)["input_ids"]
    assert tokenizer.conversation_ids(plain)[0] == whole
