"""Labelled answers (KTO): read, refused with file and line, tokenised, and padded."""

import json

import pytest
import torch
from byte_tokenizer import ASSISTANT, EOS, USER, ByteTokenizer

from rlhf.data.collate import collate_labelled
from rlhf.data.reading import read_conversations, read_labelled, read_preferences
from rlhf.data.rows import LabelledRow
from rlhf.data.sequences import LabelledSequence, TokenSequence
from rlhf.data.tokenize import labelled_sequences
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.base import PathData

ASK = {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "four"}, {"role": "assistant", "content": "five"}


def source(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PathData(path=path, **settings)


SINGLE = {
    "text": {"prompt": "2+2?", "completion": "four", "label": True},
    "messages": {"prompt": [ASK], "completion": [FOUR], "label": True},
    "an answer that repeats the prompt": {"prompt": "2+2?", "completion": [ASK, FOUR], "label": True},
    "a number": {"prompt": "2+2?", "completion": "four", "label": 1},
    "as text": {"prompt": "2+2?", "completion": "four", "label": "True"},
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("format", ["auto", "kto"])
def test_a_labelled_answer_in_all_shapes_is_the_same_row(tmp_path, name, format):
    data = source(tmp_path, SINGLE[name], format=format)
    assert read_labelled(data) == [(LabelledRow((ASK,), "four", True, f"{tmp_path}/rows.jsonl:1"),)]


@pytest.mark.parametrize("format", ["auto", "preference"])
def test_a_pair_gives_a_desirable_and_an_undesirable_answer(tmp_path, format):
    data = source(tmp_path, {"prompt": "2+2?", "chosen": "four", "rejected": "five"}, format=format)
    where = f"{tmp_path}/rows.jsonl:1"
    assert read_labelled(data) == [
        (LabelledRow((ASK,), "four", True, where), LabelledRow((ASK,), "five", False, where))
    ]


def test_csv_knows_only_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\na,b,true\nc,d,False\ne,f,0\n")
    assert [row.desirable for (row,) in read_labelled(PathData(path=path))] == [True, False, False]


REFUSED = {
    '{"prompt": "p", "completion": "c"}': "column 'label' missing",
    '{"prompt": "p", "label": true}': "column 'completion' missing",
    '{"completion": "c", "label": true}': "column 'prompt' missing",
    '{"prompt": "p", "completion": "c", "label": null}': "column 'label' is null",
    '{"prompt": "p", "completion": "c", "label": 2}': "column 'label' must be true or false, not 2",
    '{"prompt": "p", "completion": "c", "label": 1.0}': "column 'label' must be true or false, not 1.0",
    '{"prompt": "p", "completion": "c", "label": "good"}': "column 'label' must be true or false, not 'good'",
    '{"prompt": "p", "completion": "c", "label": [true]}': "column 'label' must be true or false, not an array",
    '{"prompt": "p", "completion": " ", "label": true}': "column 'completion' is empty",
    '{"prompt": [{"role": "assistant", "content": "x"}], "completion": "c", "label": true}': (
        "column 'prompt' must end with a message of the user"
    ),
    '{"prompt": "p", "completion": [{"role": "user", "content": "x"}], "label": true}': (
        "column 'completion' must be the prompt and one message of the assistant"
    ),
    '{"question": "q"}': "no known columns (found: question; known: label, completion, prompt, chosen, rejected)",
}


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=list(REFUSED.values()))
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(DataError) as error:
        read_labelled(PathData(path=path))
    assert str(error.value) == f"{path}:1: {message}"


def test_the_first_row_decides_for_the_file(tmp_path):
    data = source(tmp_path, SINGLE["text"], {"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(DataError, match=r"rows.jsonl:2: column 'completion' missing"):
        read_labelled(data)


def test_the_format_of_another_purpose_is_a_recipe_error(tmp_path):
    data = source(tmp_path, SINGLE["text"], format="kto")
    for read, purpose, known in (
        (read_preferences, "preference pairs", "auto, hh_rlhf, ultrafeedback, ranking, preference"),
        (read_conversations, "chats to imitate", "auto, messages, prompt_completion"),
    ):
        with pytest.raises(RecipeError) as error:
            read(data)
        assert str(error.value) == f"{data.path}: format 'kto' does not hold {purpose} (use {known})"
    with pytest.raises(RecipeError, match=r"does not hold labelled answers \(use auto, kto, hh_rlhf, preference\)"):
        read_labelled(source(tmp_path, SINGLE["text"], format="messages"))


def rows():
    prompt = ({"role": "user", "content": "hi"},)
    return [LabelledRow(prompt, "a", True, "k.jsonl:1"), LabelledRow(prompt, "bcd", False, "k.jsonl:2")]


def test_answers_become_tokens_with_their_end():
    short, long = labelled_sequences(rows(), ByteTokenizer(), 9)
    assert short.sequence.tokens == (USER, 104, 105, EOS, ASSISTANT, 97, EOS)
    assert short.sequence.response_mask == (False,) * 5 + (True,) * 2
    assert (short.desirable, long.desirable) == (True, False)
    with pytest.raises(DataError) as error:
        labelled_sequences(rows(), ByteTokenizer(), 8)
    assert str(error.value) == "k.jsonl:2: prompt + completion has 9 tokens, the limit is 8 (max_length)"


def test_a_batch_pads_the_sequences_and_waits_for_its_reference():
    def sequence(*tokens):
        return TokenSequence(tokens, (False,) + (True,) * (len(tokens) - 1))

    batch = collate_labelled([LabelledSequence(sequence(5, 6), False), LabelledSequence(sequence(7, 8, 9), True)], 0)
    assert batch.batch.tokens.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.batch.response_mask.tolist() == [[False, True, False], [False, True, True]]
    assert batch.desirable.tolist() == [False, True]
    assert batch.desirable.dtype == torch.bool
    assert batch.ref_logprobs.tolist() == batch.kl.tolist() == [0.0, 0.0]
