"""Lengths of the rows of a recipe's data, beside those of the sequences that training makes."""

from rlhf.data.lengths import ROWS, measured_lengths, row_lengths
from rlhf.data.rows import PreferenceRow, PromptRow
from rlhf.data.tokenize import preference_sequence, prompt_sequence
from rlhf.recipe.load import load_recipe

ASKED = ({"role": "user", "content": "2 + 2?"},)
RECIPE = """
name: one
model: {path: "tiny://llama"}
tuning: {kind: full}
stages:
  - {name: sft, kind: sft, data: {path: rows.jsonl}}
  - {name: again, kind: sft, data: {path: missing.csv}}
"""


def prompt(content):
    messages = ({"role": "user", "content": content},)
    return PromptRow(content, messages, content, {}, "rows.jsonl:1")


def test_the_longest_and_the_mean_row(tiny_tokenizer):
    rows = [prompt("a"), prompt("bbb"), prompt("cc")]
    sizes = [len(prompt_sequence(row, tiny_tokenizer, 1000).tokens) for row in rows]
    found = row_lengths(rows, tiny_tokenizer)
    assert (found.longest, found.complete) == (max(sizes), True)
    assert found.mean == sum(sizes) / 3


def test_the_prompt_of_a_pair_counts_once(tiny_tokenizer):
    row = PreferenceRow(ASKED, "four", "a number, surely", 0.0, "rows.jsonl:1")
    pair = preference_sequence(row, tiny_tokenizer, 1000)
    answers = sum(pair.chosen.response_mask) + sum(pair.rejected.response_mask)
    found = row_lengths([(row,)], tiny_tokenizer)
    assert found.mean == len(pair.chosen.tokens) - sum(pair.chosen.response_mask) + answers
    assert found.longest == len(pair.rejected.tokens)


def test_of_a_large_source_the_first_rows_are_measured(tiny_tokenizer):
    found = row_lengths((prompt("a") for _ in range(ROWS + 1)), tiny_tokenizer)
    assert not found.complete
    assert row_lengths((prompt("a") for _ in range(ROWS)), tiny_tokenizer).complete
    assert row_lengths([], tiny_tokenizer) is None


def test_of_a_recipe_what_can_be_read_is_measured(tmp_path, tiny_tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    (tmp_path / "missing.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "one.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "one.yaml").recipe
    (tmp_path / "missing.csv").unlink()
    assert set(measured_lengths(recipe, tiny_tokenizer)) == {"stages.sft.data"}
