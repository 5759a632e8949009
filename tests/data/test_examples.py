"""One file of every format that people bring: recognised, read as it is meant, and not a byte of its text harmed."""

import json
from io import StringIO
from pathlib import Path

import pytest
from byte_tokenizer import EOS, SYSTEM, ByteTokenizer
from rich.console import Console

from rlhf.data.inspection import inspect_file
from rlhf.data.reading import (
    each_preference,
    each_text,
    purpose_of,
    read_conversations,
    read_labelled,
    read_preferences,
    read_prompts,
    survey,
)
from rlhf.data.tokenize import conversation_sequences, text_sequence
from rlhf.recipe.base import PathData
from rlhf.report.inspection import print_inspection

EXAMPLES = Path(__file__).parent / "examples"


def data(name, **settings):
    return PathData(path=EXAMPLES / name, **settings)


def raw(name):
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


FOUND = {
    "alpaca.json": ("conversations", "prompt_completion", 4),
    "alpaca_zh.jsonl": ("conversations", "prompt_completion", 6),
    "messages.jsonl": ("conversations", "messages", 4),
    "messages_scripts.jsonl": ("conversations", "messages", 7),
    "sharegpt_tools.jsonl": ("conversations", "messages", 4),
    "prompt_completion.csv": ("conversations", "prompt_completion", 4),
    "prompts.jsonl": ("prompts", "prompts", 4),
    "preference.jsonl": ("preferences", "preference", 4),
    "preference_implicit.jsonl": ("preferences", "preference", 4),
    "hh_rlhf.jsonl": ("preferences", "hh_rlhf", 4),
    "ultrafeedback.jsonl": ("preferences", "ultrafeedback", 4),
    "ultrafeedback_binarized.jsonl": ("preferences", "ultrafeedback", 4),
    "kto.jsonl": ("labelled", "kto", 5),
    "ranking.jsonl": ("preferences", "ranking", 5),
    "classification.csv": ("classes", "classification", 6),
    "classification.jsonl": ("classes", "classification", 8),
}


def test_every_example_has_its_row_here():
    assert sorted(FOUND) == sorted(file.name for file in EXAMPLES.iterdir())


@pytest.mark.parametrize("name", FOUND)
def test_a_format_is_recognised_and_may_be_named(name):
    purpose, named, rows = FOUND[name]
    assert purpose_of(data(name)) == purpose_of(data(name, format=named)) == purpose
    for source in (data(name), data(name, format=named)):
        found = list(survey(source, purpose))
        assert ({item.format for item in found}, len(found)) == ({named}, rows)
        assert not any(item.error for item in found)
    one, other = (survey(source, purpose) for source in (data(name), data(name, format=named)))
    assert [item.row for item in one] == [item.row for item in other]


@pytest.mark.parametrize("name", FOUND)
def test_inspection_shows_one_row_with_its_mask(name, tiny_tokenizer):
    made = inspect_file(data(name), tiny_tokenizer)
    assert (made.bad, made.refusals) == (0, ())
    trained = [text for segments in made.example.values() for text, is_trained in segments if is_trained]
    assert bool(trained) == (made.use.purpose != "prompts")
    printed = StringIO()
    print_inspection(made, Console(file=printed, width=1000))
    assert f"format      {made.format}, for {made.use.purpose}" in printed.getvalue()
    assert all(f"[[{text}]]" in printed.getvalue() for text in trained if "\n" not in text)


def texts_of(name):
    """The texts that a row shows its reader, straight from the file."""
    for row in raw(name):
        if "messages" in row:
            yield [turn["content"] for turn in row["messages"]]
        elif "output" in row:
            asked = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
            yield [asked, row["output"]]
        else:
            yield [row["text"]]


@pytest.mark.parametrize("name", ["alpaca_zh.jsonl", "messages_scripts.jsonl", "classification.jsonl"])
def test_no_byte_of_any_script_is_lost(name, tiny_tokenizer):
    """Reading, tokenising with bytes and with a byte-level BPE, decoding, and inspecting."""
    wanted = list(texts_of(name))
    purpose = FOUND[name][0]
    rows = [item.row for item in survey(data(name), purpose)]
    if purpose == "classes":
        assert [[row.text] for row in rows] == wanted
        sequences = [text_sequence(row, ByteTokenizer(), 1000) for row in rows]
        real = [text_sequence(row, tiny_tokenizer, 1000) for row in rows]
    else:
        assert [[turn["content"] for turn in row.messages] for row in rows] == wanted
        sequences = conversation_sequences(rows, ByteTokenizer(), 1000)
        real = conversation_sequences(rows, tiny_tokenizer, 1000)
    for texts, by_bytes, by_bpe in zip(wanted, sequences, real, strict=True):
        assert bytes(token for token in by_bytes.tokens if token < 256) == "".join(texts).encode()
        decoded = tiny_tokenizer.hf.decode(list(by_bpe.tokens), clean_up_tokenization_spaces=False)
        assert all(text in decoded for text in texts)
    shown = "".join(text for text, _ in next(iter(inspect_file(data(name), tiny_tokenizer).example.values())))
    assert all(text in shown for text in wanted[0])
    printed = StringIO()
    print_inspection(inspect_file(data(name), None), Console(file=printed, width=1000))
    assert all(line in printed.getvalue() for text in wanted[0] for line in text.splitlines())


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["alpaca_zh.jsonl", "messages_scripts.jsonl"])
def test_no_byte_is_lost_by_a_real_tokenizer(name, real_folder):
    from rlhf.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(real_folder)
    for row in read_conversations(data(name)):
        tokens, mask = tokenizer.conversation_ids(row.messages)
        decoded = tokenizer.hf.decode(tokens, clean_up_tokenization_spaces=False)
        spoken = tokenizer.hf.decode(
            [token for token, is_spoken in zip(tokens, mask, strict=True) if is_spoken],
            clean_up_tokenization_spaces=False,
        )
        assert all(turn["content"] in decoded for turn in row.messages)
        assert all(turn["content"] in spoken for turn in row.messages if turn["role"] == "assistant")


def test_sharegpt_names_of_who_speaks():
    weather, _, _, rounds = read_conversations(data("sharegpt_tools.jsonl"))
    assert [turn["role"] for turn in weather.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [turn["role"] for turn in rounds.messages] == ["user", "assistant"] * 2
    (tokens,) = conversation_sequences([weather], ByteTokenizer(), 1000)
    assert tokens.tokens[0] == SYSTEM
    spoken = bytes(t for t, is_spoken in zip(tokens.tokens, tokens.response_mask, strict=True) if is_spoken and t < 256)
    assert spoken == (weather.messages[2]["content"] + weather.messages[4]["content"]).encode()
    assert sum(tokens.response_mask) == len(spoken) + 2  # with both ends of sequence
    assert tokens.tokens[-1] == EOS


def test_csv_fields_keep_quotes_and_line_breaks():
    rows = read_conversations(data("prompt_completion.csv"))
    assert rows[1].messages[1]["content"] == "Harbour without edge,\none bell counting the minutes\nuntil boats return."
    assert rows[2].messages[1]["content"] == '"Emma Woodhouse, handsome, clever, and rich ..."'


def test_transcripts_are_cut_into_turns():
    rows = read_preferences(data("hh_rlhf.jsonl"))
    assert [len(row.prompt) for row in rows] == [1, 3, 1, 3]
    assert [turn["role"] for turn in rows[1].prompt] == ["user", "assistant", "user"]
    assert rows[1].prompt[-1]["content"] == "A little."
    assert rows[1].chosen.endswith("float first.\n\nMany pools have classes for adults.")
    assert rows[1].rejected == "Jump in at the deep end."
    assert rows[3].rejected == " I don't know, 1950 or so?"  # one of two spaces is the transcript's
    assert {row.margin for row in rows} == {0.0}


def test_ultrafeedback_pairs_the_best_answer_with_each_that_scores_less():
    octopus, goldfish, cat, prime = each_preference(data("ultrafeedback.jsonl"))
    assert [row.chosen for row in octopus] == ["Octopuses have three hearts and blue blood."] * 2
    assert [row.rejected for row in octopus] == [
        "They live in the sea.",
        "Octopuses have eight legs and two brains each.",
    ]  # the fourth scores as much as the first
    assert [(row.chosen[:3], row.rejected[:3]) for row in goldfish] == [("No.", "Yes")]  # by ratings, against overall
    assert [(row.chosen, row.rejected) for row in cat] == [
        ("Le chat dort.", "La chatte dort."),
        ("Le chat dort.", "Le chien dort."),
    ]
    assert prime == ()
    assert len(read_preferences(data("ultrafeedback.jsonl"))) == 5


def test_binarised_ultrafeedback_is_plain_pairs_without_its_ties():
    rows = list(each_preference(data("ultrafeedback_binarized.jsonl")))
    assert [len(row) for row in rows] == [1, 1, 0, 1]
    (first,) = rows[0]
    assert (first.prompt[0]["content"], first.rejected, first.margin) == (
        "How can I develop a habit of drawing daily?", "Draw every day.", 0.0,
    )  # fmt: skip
    assert len(read_preferences(data("ultrafeedback_binarized.jsonl", format="preference"))) == 4


def test_a_ranking_is_all_its_pairs():
    rows = list(each_preference(data("ranking.jsonl")))
    a, b, c, d = raw("ranking.jsonl")[0]["responses"]
    assert [(row.chosen, row.rejected) for row in rows[0]] == [(b, a), (b, c), (b, d), (a, c), (a, d), (c, d)]
    assert [(row.chosen, row.rejected) for row in rows[1]] == [
        ("9", "6"), ("9", "3"), ("nine", "6"), ("nine", "3"),
    ]  # fmt: skip
    assert [len(row) for row in rows] == [6, 4, 2, 1, 0]


def test_labels_of_answers_and_texts():
    assert [row.desirable for (row,) in read_labelled(data("kto.jsonl"))] == [True, False, True, False, True]
    assert [row.label for row in each_text(data("classification.jsonl"))] == [1, 0, 1, 0, 10, 10, 0, 1]
    texts = list(each_text(data("classification.csv")))
    assert texts[3].text == 'Broken zip, "premium" my foot,\nand nobody answers the phone.'
    assert [row.where.rpartition(":")[2] for row in texts] == ["2", "3", "4", "5", "7", "8"]


def test_prompts_keep_what_a_judge_may_want():
    rows = read_prompts(data("prompts.jsonl"))
    assert [row.metadata for row in rows][:2] == [{"answer": 75}, {"answer": 72}]
    assert rows[3].id == "4"


def test_inspection_counts_what_the_rows_come_to():
    counts = {name: inspect_file(data(name), None).counts for name in FOUND}
    assert counts["ranking.jsonl"] == {"pairs": 13, "ties": 1}
    assert counts["ultrafeedback.jsonl"] == {"pairs": 5, "ties": 1}
    assert counts["kto.jsonl"] == {"desirable": 3, "undesirable": 2}
    assert counts["classification.csv"] == {"negative": 2, "positive": 2, "neutral": 2}
    assert counts["messages.jsonl"] == {}
    printed = StringIO()
    print_inspection(inspect_file(data("classification.csv"), None), Console(file=printed, width=1000))
    assert "labels      3: negative 2, positive 2, neutral 2" in printed.getvalue()
    assert "The battery died after two days. -> [[negative]]" in printed.getvalue()
    print_inspection(inspect_file(data("ranking.jsonl"), None), Console(file=printed, width=1000))
    assert "13 pairs, 1 ties" in printed.getvalue()
