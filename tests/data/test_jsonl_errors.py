"""Every way in which a row can be bad, and the exact words for it."""

import logging

import pytest

from rlhf.data.reading import read_conversations, read_preferences, read_prompts
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.base import PathData

GOOD = b'{"prompt": "p", "chosen": "yes", "rejected": "no"}\n'
OTHER = b'{"prompt": "q", "chosen": "si", "rejected": "no"}\n'

BAD_LINES = {
    b'{"prompt": "p", "chosen": "yes" "rejected": "no"}': "malformed JSON: Expecting ',' delimiter at column 33",
    b'{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "no"}': "duplicate key 'chosen'",
    b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}': "NaN is not a JSON number",
    b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -Infinity}': "-Infinity is not a JSON number",
    b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1e999}': "the number 1e999 is too large",
    b'{"prompt": "p", "chosen": "a", "rejected": "b", "x": {"y": 1, "y": 2}}': "duplicate key 'y'",
    b'["prompt", "chosen", "rejected"]': "a row must be an object, not an array",
    b"null": "a row must be an object, not null",
    b'"text"': "a row must be an object, not a string",
    b'{"prompt": "p", "chosen": "yes"}': "column 'rejected' missing",
    b'{"chosen": "yes", "rejected": "no"}': "column 'prompt' missing",
    b'{"prompt": "p", "chosen": "yes", "rejected": null}': "column 'rejected' is null",
    b'{"prompt": "p", "chosen": "yes", "rejected": "  "}': "column 'rejected' is empty",
    b'{"prompt": "p", "chosen": 3, "rejected": "no"}': (
        "column 'chosen' must be a string or a list of messages, not an integer"
    ),
    b'{"prompt": true, "chosen": "yes", "rejected": "no"}': (
        "column 'prompt' must be a string or a list of messages, not a boolean"
    ),
    b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"}': (
        "column 'margin' must be a finite number, not 'much'"
    ),
    b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": true}': (
        "column 'margin' must be a finite number, not a boolean"
    ),
    b'{"prompt": "p", "chosen": "same", "rejected": "same"}': "chosen and rejected are the same",
    b'{"prompt": "p", "chosen": "caf\xe9", "rejected": "no"}': "not UTF-8 (byte 0xe9 at column 31)",
    b'{"prompt": "\\ud800", "chosen": "yes", "rejected": "no"}': "half of a surrogate pair, which is no character",
    b"[" * 100_000: "JSON is nested too deeply",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=list(BAD_LINES.values()))
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD + b"\n" + OTHER + line + b"\n" + GOOD)
    with pytest.raises(DataError) as error:
        read_preferences(PathData(path=path))
    assert str(error.value) == f"{path}:4: {message}"


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=list(BAD_LINES.values()))
def test_a_bad_row_is_skipped_and_counted_when_allowed(tmp_path, caplog, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD + line + b"\n" + OTHER)
    with caplog.at_level(logging.WARNING):
        rows = read_preferences(PathData(path=path, max_bad_rows=1))
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert caplog.messages == [f"{path}: skipped 1 bad rows, read 2; the first: {path}:2: {message}"]


def test_one_bad_row_too_many_stops(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"{}\n[]\n" + GOOD + b"7\n")
    with pytest.raises(DataError) as error:
        read_preferences(PathData(path=path, max_bad_rows=2))
    assert str(error.value) == (f"{path}:4: a row must be an object, not an integer (bad row 3, max_bad_rows is 2)")


MESSAGE_ROWS = {
    '{"messages": "hi"}': "column 'messages' must be a list of messages, not a string",
    '{"messages": []}': "column 'messages' is empty",
    '{"messages": ["hi"]}': "messages[0] must be a message, not a string",
    '{"messages": [{"role": "user"}]}': "messages[0]: 'content' missing",
    '{"messages": [{"role": "user", "content": null}]}': "messages[0]: 'content' must be a string, not null",
    '{"messages": [{"role": "user", "content": ""}]}': "messages[0]: 'content' is empty",
    '{"messages": [{"role": "bot", "content": "hi"}]}': (
        "messages[0]: unknown role 'bot' (known: system, user, human, assistant, gpt, chatgpt, function_call, tool, "
        "observation, function_response)"
    ),
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "system", "content": "x"}]}': (
        "column 'messages': only the first message may be the system's"
    ),
    '{"messages": [{"role": "user", "content": "hi"}]}': "the last message must be the assistant's, not the user's",
    '{"conversations": [{"from": "gpt", "content": "hi"}]}': "conversations[0]: 'value' missing",
    '{"prompt": "p"}': "column 'completion' missing",
    '{"instruction": "i", "output": 4}': "column 'output' must be a string, not an integer",
    '{"question": "q", "answer": "a"}': (
        "no known columns (found: question, answer; known: messages, conversations, prompt, completion, "
        "instruction, output); perhaps columns: {prompt: question, completion: answer}"
    ),
}


@pytest.mark.parametrize(("line", "message"), MESSAGE_ROWS.items(), ids=list(MESSAGE_ROWS.values()))
def test_a_bad_conversation_is_named(tmp_path, line, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(line)
    with pytest.raises(DataError) as error:
        read_conversations(PathData(path=path))
    assert str(error.value) == f"{path}:1: {message}"


@pytest.mark.parametrize(
    "line", ['{"id": [1], "prompt": "p"}', '{"id": true, "prompt": "p"}', '{"id": "", "prompt": "p"}']
)
def test_a_prompt_id_must_be_a_name(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(DataError) as error:
        read_prompts(PathData(path=path))
    assert str(error.value) == f"{path}:1: column 'id' must be a string or an integer"


def test_a_prompt_must_end_with_the_user(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    with pytest.raises(DataError) as error:
        read_prompts(PathData(path=path))
    assert str(error.value) == f"{path}:1: column 'prompt' must end with a message of the user"


def test_files_that_hold_nothing(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError) as error:
        read_prompts(PathData(path=path))
    assert str(error.value) == f"{path}: no rows"
    path.write_text("{}\n")
    with pytest.raises(DataError) as error:
        read_prompts(PathData(path=path, max_bad_rows=5))
    assert str(error.value) == f"{path}: no rows but bad ones, the first: {path}:1: column 'prompt' missing"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError) as error:
        read_prompts(PathData(path=tmp_path / "none.jsonl"))
    assert str(error.value) == f"{tmp_path}/none.jsonl: no such file"
    (tmp_path / "data.txt").write_text("hello")
    with pytest.raises(DataError) as error:
        read_prompts(PathData(path=tmp_path / "data.txt"))
    assert str(error.value) == f"{tmp_path}/data.txt: unknown kind of file (use .jsonl, .json, .csv, .parquet)"


def test_a_format_of_another_purpose_is_a_recipe_error(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(RecipeError) as error:
        read_conversations(PathData(path=path, format="preference"))
    assert str(error.value) == (
        f"{path}: format 'preference' does not hold chats to imitate (use auto, messages, prompt_completion)"
    )


def test_a_missing_renamed_column_names_both(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(GOOD)
    with pytest.raises(DataError) as error:
        read_preferences(PathData(path=path, columns={"chosen": "better"}))
    assert (
        str(error.value)
        == f"{path}:1: column 'better' missing (it is to be our 'chosen'; found: prompt, chosen, rejected)"
    )
