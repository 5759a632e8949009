"""Files of the wrong format, of two formats, or with columns of other names: where, what was found, what helps."""

import json
import re

import pytest

from rlhf.data.inspection import inspect_file
from rlhf.data.reading import each_text, read_conversations, read_labelled, read_preferences, read_prompts
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.base import PathData

ALPACA = {"instruction": "Add.", "output": "4"}
CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
COMPLETION = {"prompt": "2+2?", "completion": "4"}
PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
RANKING = {"prompt": "2+2?", "responses": ["4", "5"], "ranking": [0, 1]}
LABELLED = {**COMPLETION, "label": True}
TEXT = {"text": "Fine.", "label": "good"}
TRANSCRIPTS = {
    "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
    "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
}
FEEDBACK = {"instruction": "Add.", "completions": [{"response": "4", "overall_score": 9}]}


def source(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PathData(path=path, **settings)


def message(read, data):
    with pytest.raises(DataError) as error:
        list(read(data))
    return str(error.value).removeprefix(str(data.path))


MIXED = {
    "alpaca after completions": (
        read_conversations, COMPLETION, ALPACA,
        ":2: column 'prompt' missing; this row looks like alpaca (columns instruction, output), those before it are"
        " prompt_completion: a file holds rows of one format",
    ),
    "chats after alpaca": (
        read_conversations, ALPACA, CHAT,
        ":2: column 'instruction' missing; this row looks like messages (columns messages), those before it are alpaca:"
        " a file holds rows of one format",
    ),
    "a pair after a ranking": (
        read_preferences, RANKING, PAIR,
        ":2: column 'responses' missing; this row looks like preference (columns chosen, rejected), those before it are"
        " ranking: a file holds rows of one format",
    ),
    "transcripts after pairs": (
        read_preferences, PAIR, TRANSCRIPTS,
        ":2: column 'prompt' missing; this row looks like hh_rlhf (columns chosen, rejected), those before it are"
        " preference: a file holds rows of one format",
    ),
    "pairs after labelled answers": (
        read_labelled, LABELLED, PAIR,
        ":2: column 'completion' missing; this row looks like preference (columns chosen, rejected), those before it"
        " are kto: a file holds rows of one format",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_a_file_of_two_formats_is_refused_at_the_row_that_differs(tmp_path, name):
    read, first, second, expected = MIXED[name]
    assert message(read, source(tmp_path, first, second)) == expected


def test_a_row_that_only_lacks_a_column_is_no_other_format(tmp_path):
    assert message(read_preferences, source(tmp_path, PAIR, {"prompt": "p", "chosen": "a"})) == (
        ":2: column 'rejected' missing"
    )


WRONG = {
    "pairs for SFT": (
        read_conversations, PAIR,
        ":1: column 'completion' missing; this row looks like preference (columns chosen, rejected), which holds"
        " preference pairs, but chats to imitate are wanted here",
    ),
    "a ranking for SFT": (
        read_conversations, RANKING,
        ":1: column 'completion' missing; this row looks like ranking (columns ranking, responses, prompt), which holds"
        " preference pairs, but chats to imitate are wanted here",
    ),
    "chats for DPO": (
        read_preferences, CHAT,
        ":1: no known columns (found: messages; known: chosen, rejected, completions, instruction, score_chosen,"
        " score_rejected, ranking, responses, prompt); this row looks like messages (columns messages), which holds"
        " chats to imitate, but preference pairs are wanted here",
    ),
    "chats for classification": (
        each_text, CHAT,
        ":1: column 'text' missing; this row looks like messages (columns messages), which holds chats to imitate, but"
        " texts with a label are wanted here",
    ),
    "texts with a label for KTO": (
        read_labelled, TEXT,
        ":1: column 'prompt' missing; this row looks like classification (columns text, label), which holds texts with"
        " a label, but labelled answers are wanted here",
    ),
    "chats as prompts": (
        read_prompts, CHAT,
        ":1: column 'prompt' missing; this row looks like messages (columns messages), which holds chats to imitate,"
        " but prompts are wanted here",
    ),
    "UltraFeedback for SFT": (
        read_conversations, FEEDBACK,
        ":1: column 'output' missing; this row looks like ultrafeedback (columns completions, instruction), which holds"
        " preference pairs, but chats to imitate are wanted here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_for_another_purpose_says_what_it_is(tmp_path, name):
    read, row, expected = WRONG[name]
    assert message(read, source(tmp_path, row)) == expected


NAMED = {
    "messages": (COMPLETION, read_conversations, "prompt_completion"),
    "prompt_completion": (CHAT, read_conversations, "messages"),
    "preference": (RANKING, read_preferences, "ranking"),
    "ranking": (PAIR, read_preferences, "preference"),
    "ultrafeedback": (PAIR, read_preferences, "preference"),
    "kto": (PAIR, read_labelled, "preference"),
}


@pytest.mark.parametrize("name", NAMED)
def test_another_format_than_the_named_one_is_recognised(tmp_path, name):
    row, read, right = NAMED[name]
    found = message(read, source(tmp_path, row, format=name))
    assert re.match(r":1: (no known columns|column '\w+' missing)", found)
    assert found.endswith(f"set format: {right}")
    assert list(read(source(tmp_path, row, format=right)))


def test_transcripts_named_as_plain_pairs_are_recognised(tmp_path):
    assert message(read_preferences, source(tmp_path, TRANSCRIPTS, format="preference")).endswith("set format: hh_rlhf")


RENAMED = {
    "question and answer": (
        read_conversations, {"question": "q", "answer": "a"}, "{prompt: question, completion: answer}"
    ),
    "instruction and response": (
        read_conversations, {"instruction": "q", "response": "a"}, "{prompt: instruction, completion: response}"
    ),
    "a question alone": (read_prompts, {"question": "q"}, "{prompt: question}"),
    "better and worse": (
        read_preferences, {"prompt": "q", "better": "a", "worse": "b"}, "{chosen: better, rejected: worse}"
    ),
    "sentences": (each_text, {"sentence": "s", "label": 1}, "{text: sentence}"),
    "sentiment": (each_text, {"review": "s", "sentiment": "good"}, "{text: review, label: sentiment}"),
}  # fmt: skip


@pytest.mark.parametrize("name", RENAMED)
def test_columns_of_other_names_are_guessed_and_the_guess_works(tmp_path, name):
    read, row, guess = RENAMED[name]
    assert message(read, source(tmp_path, row)).endswith(f"; perhaps columns: {guess}")
    columns = dict(part.split(": ") for part in guess.strip("{}").split(", "))
    assert len(list(read(source(tmp_path, row, columns=columns)))) == 1


def test_columns_that_nobody_knows_are_listed(tmp_path):
    assert message(read_conversations, source(tmp_path, {"a": 1, "b": 2})) == (
        ":1: no known columns (found: a, b; known: messages, conversations, prompt, completion, instruction, output)"
    )


def test_a_damaged_first_row_does_not_decide_the_format(tmp_path):
    data = source(tmp_path, {**TRANSCRIPTS, "chosen": None}, TRANSCRIPTS, TRANSCRIPTS, max_bad_rows=1)
    assert [row.chosen for row in read_preferences(data)] == ["4", "4"]


def test_a_format_of_another_purpose_lists_those_that_fit(tmp_path):
    with pytest.raises(RecipeError, match=r"format 'messages' does not hold texts with a label \(use auto, class"):
        list(each_text(source(tmp_path, TEXT, format="messages")))
    with pytest.raises(
        RecipeError,
        match=r"'kto' does not hold preference pairs \(use auto, hh_rlhf, ultrafeedback, ranking, preference\)",
    ):
        read_preferences(source(tmp_path, PAIR, format="kto"))


BAD = {
    "not a transcript": (
        {**TRANSCRIPTS, "rejected": "No."}, "column 'rejected' must begin with '\\n\\nHuman:', not 'No.'",
    ),
    "an empty turn": (
        {**TRANSCRIPTS, "rejected": "\n\nHuman: 2+2?\n\nAssistant:"}, "rejected[1]: 'content' is empty",
    ),
    "transcripts that part early": (
        {**TRANSCRIPTS, "rejected": "\n\nHuman: 3+3?\n\nAssistant: 6"},
        "the common start of chosen and rejected must end with a message of the user",
    ),
    "a transcript that ends with the user": (
        {**TRANSCRIPTS, "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4\n\nHuman: Sure?"},
        "column 'chosen' must be the prompt and one message of the assistant",
    ),
    "a ranking that leaves one out": (
        {**RANKING, "ranking": [1]},
        "column 'ranking' must name each of the 2 responses once, by its number from 0, best first (a list within it is"
        " a tie), not [1]",
    ),
    "a ranking from 1": (
        {**RANKING, "ranking": [1, 2]},
        "column 'ranking' must name each of the 2 responses once, by its number from 0, best first (a list within it is"
        " a tie), not [1, 2]",
    ),
    "a ranking of texts": (
        {**RANKING, "ranking": ["a", True]},
        "column 'ranking' must name each of the 2 responses once, by its number from 0, best first (a list within it is"
        " a tie), not ['a', True]",
    ),
    "equal responses ranked apart": (
        {**RANKING, "responses": ["4", "4"]}, "two responses are the same and ranked apart",
    ),
    "a response that is no text": ({**RANKING, "responses": ["4", 5]}, "responses[1] must be text, not an integer"),
    "a blank response": ({**RANKING, "responses": ["4", " "]}, "responses[1] must be text, not empty text"),
    "responses that are no list": ({**RANKING, "responses": "4"}, "column 'responses' must be a list, not a string"),
    "a completion without text": (
        {**FEEDBACK, "completions": [{"response": ""}]},
        "completions[0] must have a 'response' that is text, not empty text",
    ),
    "a completion without a score": (
        {**FEEDBACK, "completions": [{"response": "4"}]},
        "completions[0] has no ratings in 'annotations' and no 'overall_score'",
    ),
    "scores the wrong way round": (
        {**PAIR, "score_chosen": 3, "score_rejected": 8}, "score_chosen 3 is below score_rejected 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_preferences_are_named_by_line(tmp_path, name):
    row, expected = BAD[name]
    assert message(read_preferences, source(tmp_path, row)) == f":1: {expected}"


def test_nothing_but_ties_is_refused(tmp_path):
    data = source(tmp_path, {**RANKING, "ranking": [[0, 1]]}, {**RANKING, "ranking": [[1, 0]]})
    assert message(read_preferences, data) == ": no pairs, as each of the 2 rows is a tie"
    assert inspect_file(data, None).refusals == (f"{data.path}: no pairs, as each of the 2 rows is a tie",)


LABELS = {
    "a boolean": (True, "column 'label' must be a string or an integer, not a boolean"),
    "a fraction": (0.5, "column 'label' must be a string or an integer, not a number"),
    "null": (None, "column 'label' is null"),
    "blank": ("  ", "column 'label' is empty"),
    "white space around it": (" good", "column 'label': ' good' begins or ends with white space"),
    "a list": (["good"], "column 'label' must be a string or an integer, not an array"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_cannot_be_read(tmp_path, name):
    label, expected = LABELS[name]
    assert message(each_text, source(tmp_path, {**TEXT, "label": label})) == f":1: {expected}"
