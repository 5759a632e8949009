"""Each known format to its typed row."""

import json

import pytest

from rlhf.data.reading import read_conversations, read_preferences, read_prompts
from rlhf.errors import DataError
from rlhf.recipe.base import PathData


def turn(role, content):
    return {"role": role, "content": content}


def source(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PathData(path=path, **settings)


ASK, ANSWER = turn("user", "2+2?"), turn("assistant", "4")

CONVERSATIONS = {
    "messages": ({"messages": [ASK, ANSWER]}, (ASK, ANSWER)),
    "system": ({"messages": [turn("system", "Be brief."), ASK, ANSWER]}, (turn("system", "Be brief."), ASK, ANSWER)),
    "two rounds": ({"messages": [ASK, ANSWER, ASK, ANSWER]}, (ASK, ANSWER, ASK, ANSWER)),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "weight": 1}]},
        (ASK, ANSWER),
    ),
    "conversations with roles": ({"conversations": [ASK, ANSWER]}, (ASK, ANSWER)),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, (ASK, ANSWER)),
    "as messages": ({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}, (ASK, ANSWER, ASK, ANSWER)),
    "alpaca": ({"instruction": "2+2?", "input": "", "output": "4"}, (ASK, ANSWER)),
    "alpaca without input": ({"instruction": "2+2?", "output": "4"}, (ASK, ANSWER)),
    "alpaca with input": (
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        (turn("user", "Add.\n\n2, 2"), ANSWER),
    ),
    "messages beside a prompt": ({"prompt": "2+2?", "messages": [ASK, ANSWER]}, (ASK, ANSWER)),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_recognised_by_their_columns(tmp_path, name):
    row, messages = CONVERSATIONS[name]
    (conversation,) = read_conversations(source(tmp_path, row))
    assert conversation.messages == messages
    assert conversation.where == f"{tmp_path}/rows.jsonl:1"


def test_a_named_format_wins_over_detection(tmp_path):
    row = {"prompt": "2+2?", "completion": "4", "messages": "not used"}
    (conversation,) = read_conversations(source(tmp_path, row, format="prompt_completion"))
    assert conversation.messages == (ASK, ANSWER)


def test_the_first_row_decides_for_the_file(tmp_path):
    data = source(tmp_path, {"prompt": "2+2?", "completion": "4"}, {"instruction": "2+2?", "output": "4"})
    with pytest.raises(DataError, match=r"rows.jsonl:2: column 'prompt' missing"):
        read_conversations(data)


def test_columns_are_renamed_before_detection(tmp_path):
    row = {"question": "2+2?", "best": "4", "prompt": "another column of that name"}
    (conversation,) = read_conversations(source(tmp_path, row, columns={"prompt": "question", "completion": "best"}))
    assert conversation.messages == (ASK, ANSWER)


def test_columns_can_be_swapped(tmp_path):
    row = {"prompt": "p", "chosen": "worse", "rejected": "better"}
    (pair,) = read_preferences(source(tmp_path, row, columns={"chosen": "rejected", "rejected": "chosen"}))
    assert (pair.chosen, pair.rejected) == ("better", "worse")


def test_prompts_keep_their_other_columns_as_metadata(tmp_path):
    chat = [turn("system", "Be brief."), ASK, ANSWER, turn("user", "And 3+3?")]
    rows = read_prompts(
        source(
            tmp_path,
            {"prompt": "2+2?", "id": "sum", "answer": 4, "tags": ["a"]},
            {"id": 7, "prompt": chat},
            {"prompt": "x"},
        )
    )
    assert [row.id for row in rows] == ["sum", "7", "3"]
    assert [row.text for row in rows] == ["2+2?", "And 3+3?", "x"]
    assert rows[0].metadata == {"answer": 4, "tags": ["a"]}
    assert rows[0].messages == (ASK,)
    assert rows[1].messages == tuple(chat)


BETTER, WORSE = turn("assistant", "four"), turn("assistant", "five")

PREFERENCES = {
    "text": {"prompt": "2+2?", "chosen": "four", "rejected": "five"},
    "messages": {"prompt": [ASK], "chosen": [BETTER], "rejected": [WORSE]},
    "text prompt, message answers": {"prompt": "2+2?", "chosen": [BETTER], "rejected": [WORSE]},
    "answers that repeat the prompt": {"prompt": "2+2?", "chosen": [ASK, BETTER], "rejected": [ASK, WORSE]},
    "implicit prompt": {"chosen": [ASK, BETTER], "rejected": [ASK, WORSE]},
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_in_all_shapes_are_the_same_pair(tmp_path, name):
    (pair,) = read_preferences(source(tmp_path, PREFERENCES[name]))
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ((ASK,), "four", "five", 0.0)


def test_an_implicit_prompt_may_have_many_turns(tmp_path):
    start = [turn("system", "Be brief."), ASK, ANSWER, turn("user", "Sure?")]
    row = {"chosen": [*start, BETTER], "rejected": [*start, WORSE], "margin": 1}
    (pair,) = read_preferences(source(tmp_path, row))
    assert pair.prompt == tuple(start)
    assert (pair.chosen, pair.rejected, pair.margin) == ("four", "five", 1.0)


REFUSED = {
    "no common start": (
        {"chosen": [ASK, BETTER], "rejected": [turn("user", "3+3?"), WORSE]},
        "the common start of chosen and rejected must end with a message of the user",
    ),
    "part ways early": (
        {"chosen": [ASK, BETTER, ASK, BETTER], "rejected": [ASK, WORSE, ASK, WORSE]},
        "column 'chosen' must be the prompt and one message of the assistant",
    ),
    "another prompt in rejected": (
        {"prompt": "2+2?", "chosen": [ASK, BETTER], "rejected": [turn("user", "3+3?"), WORSE]},
        "column 'rejected' must be the prompt and one message of the assistant",
    ),
    "identical chats": ({"chosen": [ASK, BETTER], "rejected": [ASK, BETTER]}, "chosen and rejected are the same"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pairs_without_one_prompt_and_two_answers_are_refused(tmp_path, name):
    row, message = REFUSED[name]
    with pytest.raises(DataError) as error:
        read_preferences(source(tmp_path, row))
    assert str(error.value) == f"{tmp_path}/rows.jsonl:1: {message}"
