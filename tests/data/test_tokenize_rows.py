"""Rows to token ids, worked by hand with a byte tokenizer."""

import pytest
from byte_tokenizer import ASSISTANT, EOS, USER, ByteTokenizer

from rlhf.data.rows import Conversation, PreferenceRow, PromptRow
from rlhf.data.tokenize import conversation_sequences, preference_sequences, tokenize_prompts
from rlhf.errors import DataError
from rlhf.types import Prompt

USER_HI = {"role": "user", "content": "hi"}
SAYS_A = {"role": "assistant", "content": "a"}


def prompt_row(name, line):
    return PromptRow(name, (USER_HI,), "hi", {"k": 1}, f"p.jsonl:{line}")


def test_a_conversation_trains_every_assistant_turn_and_its_end():
    rows = [Conversation((USER_HI, SAYS_A, USER_HI, SAYS_A), "c.jsonl:1")]
    (sequence,) = conversation_sequences(rows, ByteTokenizer(), 14)
    assert sequence.tokens == (USER, 104, 105, EOS, ASSISTANT, 97, EOS) * 2
    assert sequence.response_mask == (False, False, False, False, False, True, True) * 2
    with pytest.raises(DataError) as error:
        conversation_sequences(rows, ByteTokenizer(), 13)
    assert str(error.value) == "c.jsonl:1: conversation has 14 tokens, the limit is 13 (max_length)"


def test_a_prompt_ends_where_the_assistant_speaks():
    (prompt,) = tokenize_prompts([prompt_row("x", 1)], ByteTokenizer(), 5)
    assert prompt == Prompt("x", (USER, 104, 105, EOS, ASSISTANT), "hi", {"k": 1})
    with pytest.raises(DataError) as error:
        tokenize_prompts([prompt_row("x", 4)], ByteTokenizer(), 4)
    assert str(error.value) == "p.jsonl:4: prompt has 5 tokens, the limit is 4 (max_prompt_tokens)"


def test_an_id_belongs_to_one_prompt():
    with pytest.raises(DataError) as error:
        tokenize_prompts([prompt_row("x", 1), prompt_row("y", 2), prompt_row("x", 3)], ByteTokenizer(), 5)
    assert str(error.value) == "p.jsonl:3: prompt id 'x' is taken already, by p.jsonl:1"


def test_both_sides_of_a_pair_share_the_prompt():
    rows = [PreferenceRow((USER_HI,), "a", "bc", 0.5, "d.jsonl:1")]
    (pair,) = preference_sequences(rows, ByteTokenizer(), 8)
    assert pair.chosen.tokens == (USER, 104, 105, EOS, ASSISTANT, 97, EOS)
    assert pair.chosen.response_mask == (False,) * 5 + (True,) * 2
    assert pair.rejected.tokens == (USER, 104, 105, EOS, ASSISTANT, 98, 99, EOS)
    assert pair.rejected.response_mask == (False,) * 5 + (True,) * 3
    assert pair.margin == 0.5
    with pytest.raises(DataError) as error:
        preference_sequences(rows, ByteTokenizer(), 7)
    assert str(error.value) == "d.jsonl:1: prompt + rejected has 8 tokens, the limit is 7 (max_length)"


def test_what_the_tokenizer_refuses_is_named_by_its_row():
    class Strict(ByteTokenizer):
        def conversation_ids(self, messages):
            raise DataError("the chat template refuses a conversation of roles user, user")

    with pytest.raises(DataError) as error:
        conversation_sequences([Conversation((USER_HI, USER_HI), "c.jsonl:9")], Strict(), 10)
    assert str(error.value) == "c.jsonl:9: the chat template refuses a conversation of roles user, user"
