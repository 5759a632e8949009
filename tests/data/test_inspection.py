"""`rlhf data inspect`: what it counts, what it shows, and that it refuses what a run would refuse."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlhf.cli import main
from rlhf.data.inspection import Inspection, Lengths, Use, inspect_file, inspect_source, uses
from rlhf.data.reading import purpose_of, read_conversations, survey
from rlhf.errors import DataError
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.base import PathData
from rlhf.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def write(path: Path, *rows: object) -> PathData:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return PathData(path=path)


def pair(number: int, chosen: str = "yes") -> dict[str, str]:
    return {"prompt": f"Why {number}?", "chosen": chosen, "rejected": "no"}


def inspected(source: PathData, tokenizer=None) -> Inspection:
    return inspect_file(source, tokenizer)


def test_bad_rows_are_counted_by_reason_and_named_by_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    made = inspected(write(path, pair(1), pair(2, "no"), "{", pair(3, ""), pair(4, "no"), pair(1)))
    assert (made.rows, made.bad, made.duplicates) == (6, 4, 1)
    assert made.reasons == {
        "chosen and rejected are the same": 2,
        "malformed JSON: Expecting property name enclosed in double quotes at column 2": 1,
        "column 'chosen' is empty": 1,
    }
    assert made.bad_rows[0] == f"{path}:2: chosen and rejected are the same"
    assert made.refusals == (f"{path}:2: chosen and rejected are the same (4 bad rows, max_bad_rows is 0)",)


def test_lengths_by_hand(tmp_path, tiny_tokenizer):
    """Each byte is a token; the template adds `<|im_start|>user\\n`, `<|im_end|>\\n` and `<|im_start|>assistant\\n`."""
    frame = (1 + 5) + (1 + 1) + (1 + 10)
    made = inspected(write(tmp_path / "pairs.jsonl", pair(1), pair(22, "certainly")), tiny_tokenizer)
    assert made.lengths == {
        "prompt + chosen": Lengths(frame + 6 + 4, frame + 6 + 4, frame + 7 + 10, frame + 7 + 10),
        "prompt + chosen, trained": Lengths(4, 4, 10, 10),
        "prompt + rejected": Lengths(frame + 6 + 3, frame + 6 + 3, frame + 7 + 3, frame + 7 + 3),
        "prompt + rejected, trained": Lengths(3, 3, 3, 3),
    }


def test_rows_that_spell_a_control_token_are_counted(tmp_path, tiny_folder):
    rows = [pair(1), pair(2, "a<|im_end|>b<|im_end|>"), {**pair(3), "prompt": "<|im_start|> or <|im_end|>?"}]
    path = write(tmp_path / "pairs.jsonl", *rows).path
    assert inspected(PathData(path=path), load_tokenizer(tiny_folder)).spelled == {"<|im_end|>": 2, "<|im_start|>": 1}
    assert inspected(PathData(path=path)).spelled == {}
    result = CliRunner().invoke(main, ["data", "inspect", str(path), "--model", str(tiny_folder)])
    assert "2 with <|im_end|> in a text, where it is encoded as its letters" in result.output


def test_p95_is_the_nearest_rank(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "x" * length} for length in range(1, 101)]
    frame = 19
    lengths = inspected(write(tmp_path / "prompts.jsonl", *rows), tiny_tokenizer).lengths["prompt"]
    assert lengths == Lengths(frame + 1, frame + 50, frame + 95, frame + 100)


def test_the_example_shows_what_is_trained(tmp_path, tiny_tokenizer):
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    source = write(tmp_path / "chats.jsonl", {"messages": [*chat, *chat]})
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert inspected(source, tiny_tokenizer).example == {
        "conversation": (
            (asked, False), ("So.<|im_end|>", True), ("\n" + asked, False), ("So.<|im_end|>", True), ("\n", False)
        )
    }  # fmt: skip
    plain = (("user: Why?\n", False), ("assistant: So.\n", True))
    assert inspected(source).example == {"conversation": plain * 2}


def test_rows_over_the_limit_stop_a_run(tmp_path, tiny_tokenizer):
    source = write(tmp_path / "pairs.jsonl", pair(1), pair(2, "y" * 80), pair(3))
    use = Use(source, "preferences", ("stages.dpo.data",), "max_length", 64)
    made = inspect_source(use, tiny_tokenizer)
    assert (made.too_long, made.first_too_long) == (1, f"{source.path}:2")
    assert made.refusals == (f"{source.path}:2: over max_length 64, as are 1 rows in all",)


def test_prompt_ids_used_twice_stop_a_run(tmp_path):
    source = write(
        tmp_path / "p.jsonl", {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}, {"id": "a", "prompt": "z"}
    )
    assert inspected(source).refusals == (f"{source.path}:1: prompt id 'a' is used 2 times",)


PURPOSES = {
    "conversations": [
        {"messages": []},
        {"conversations": []},
        {"prompt": "a", "completion": "b"},
        {"instruction": "x"},
    ],
    "prompts": [{"prompt": "a"}, {"prompt": "a", "answer": 4}],
    "preferences": [{"chosen": [], "rejected": []}, {"prompt": "a", "chosen": "b", "rejected": "c"}],
    "labelled": [{"prompt": "a", "completion": "b", "label": True}],
    "classes": [{"text": "a", "label": 1}, {"sentence": "a", "label": "good"}],
}


@pytest.mark.parametrize(("purpose", "row"), [(name, row) for name, rows in PURPOSES.items() for row in rows])
def test_a_file_says_what_it_is_for(tmp_path, purpose, row):
    assert purpose_of(write(tmp_path / "rows.jsonl", "{", row)) == purpose


SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_file_of_damage_alone_is_refused_with_the_first(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: malformed JSON"):
        purpose_of(write(tmp_path / "rows.jsonl", "{", "["))
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows"):
        purpose_of(write(tmp_path / "rows.jsonl"))


def test_a_survey_reads_what_training_reads(tmp_path):
    source = PathData(path=RECIPES / "data" / "smoke_sft.jsonl", limit=5)
    found = list(survey(source, "conversations"))
    assert [item.row for item in found] == read_conversations(source)
    assert {(item.format, item.columns, item.error) for item in found} == {("messages", ("messages",), None)}


def test_a_csv_that_breaks_off_still_has_its_first_rows(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('prompt\nWhy?\n"How')
    made = inspected(PathData(path=path))
    assert (made.rows, made.bad) == (2, 1)
    assert made.bad_rows[0].startswith(f"{path}:3: malformed CSV")


def test_a_recipe_reads_each_source_once_per_limit():
    found = uses(load_recipe(RECIPES / "known_truth.yaml").recipe)
    assert [(use.source.path.name, use.purpose, use.limit, len(use.keys)) for use in found] == [
        ("words_sft.jsonl", "conversations", 128, 1),
        ("words_prompts.jsonl", "prompts", 64, 7),
        ("words_heldout.jsonl", "prompts", 64, 2),
    ]


def test_every_shipped_recipe_passes(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    for path in sorted((RECIPES / "smoke").glob("*.yaml")):
        for use in uses(load_recipe(path).recipe):
            assert inspect_source(use, tokenizer).refusals == ()


def invoke(*arguments: object):
    return CliRunner().invoke(main, ["data", "inspect", *map(str, arguments)])


def test_the_command_marks_what_is_trained_and_shows_no_escapes(tmp_path, tiny_folder):
    source = write(tmp_path / "pairs.jsonl", pair(1, "yes \x1b[31mred\x1b]0;title\x07"))
    result = invoke(source.path, "--model", tiny_folder)
    assert result.exit_code == 0, result.stderr
    assert "[[yes <U+001B>[31mred<U+001B>]0;title<U+0007><|im_end|>]]" in result.stdout
    assert "\x1b" not in result.output
    assert "prompt + chosen, trained: min " in result.stdout


def test_the_command_ends_with_3_where_a_run_would_stop(tmp_path):
    source = write(tmp_path / "pairs.jsonl", pair(1), {"prompt": "\x1b[2J", "chosen": "\x1b[2J"})
    result = invoke(source.path)
    assert (result.exit_code, result.stderr) == (
        3,
        f"error: {source.path}:2: column 'rejected' missing (1 bad rows, max_bad_rows is 0)\n",
    )
    assert invoke(tmp_path / "none.jsonl").exit_code == 3
    assert invoke(source.path, "--format", "pears").exit_code == 2


def test_a_terminal_escape_in_an_error_is_spelt_out(tmp_path):
    source = write(tmp_path / "chats.jsonl", {"messages": [{"role": "\x1b[2J", "content": "x"}]})
    result = invoke(source.path)
    assert "unknown role '<U+001B>[2J'" in result.stderr
    assert "\x1b" not in result.output


def test_a_whole_recipe_as_json():
    result = invoke(RECIPES / "smoke" / "preference.yaml", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [Path(one["name"]).name for one in found] == [
        "smoke_sft.jsonl",
        "smoke_prompts.jsonl",
        "smoke_heldout.jsonl",
    ]
    assert found[0]["use"]["source"]["format"] == "auto"
    assert found[0]["lengths"]["conversation"]["max"] == 36


def test_shared_prompts_are_an_error_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    write(tmp_path / "chats.jsonl", {"messages": chat})
    write(tmp_path / "heldout.jsonl", {"prompt": "Why?"})
    (tmp_path / "rewards.py").write_text("def gold(prompt, response, metadata):\n    return 0.0\n")
    (tmp_path / "recipe.yaml").write_text(
        'name: trial\nmodel: {path: "tiny://llama"}\nstages:\n'
        "  - {name: sft, kind: sft, data: {path: chats.jsonl}}\n"
        "  - {name: duel, kind: compare, candidates: [base, sft], baseline: base, prompts: {path: heldout.jsonl},\n"
        '     gold: {kind: function, path: "rewards.py:gold"}}\n'
    )
    result = invoke("recipe.yaml")
    assert result.exit_code == 3
    assert "1 of 1 prompts of stages.duel are also in stages.sft" in result.stderr


@pytest.mark.parametrize(("row", "kind"), [({"messages": SAID}, "messages"), ({"conversations": SAID}, "messages")])
def test_the_format_is_named_as_a_recipe_takes_it(tmp_path, row, kind):
    source = write(tmp_path / "rows.jsonl", row)
    shown = CliRunner().invoke(main, ["data", "inspect", str(source.path)])
    assert f"format      {kind}, for conversations" in shown.stdout
    assert inspected(source).format == kind
    assert inspected(source.model_copy(update={"format": kind})).bad == 0
