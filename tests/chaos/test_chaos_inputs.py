"""The rows about inputs, each with a few faults, and that they would see what they look for."""

import random
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.chaos import bad_recipes, jsonl, recipes


@pytest.mark.parametrize(
    ("row", "count"), [(recipes, 120), (jsonl, 250), (bad_recipes, 4)], ids=["recipes", "jsonl", "nine"]
)
def test_a_few_faults(row, count):
    seen = row.run(count, random.Random(5))
    assert seen.counts["injected"] == count
    assert seen.passed, str(seen)


def test_the_same_seed_makes_the_same_faults():
    assert str(jsonl.run(60, random.Random(3))) == str(jsonl.run(60, random.Random(3)))
    assert str(recipes.run(30, random.Random(3))) == str(recipes.run(30, random.Random(3)))


def test_every_typo_is_one_letter_of_one_key():
    text = (recipes.SHIPPED / "quickstart.yaml").read_text()
    rng = random.Random(1)
    for _ in range(200):
        right, broken = recipes.typo(text, rng)
        assert broken != text
        assert abs(len(broken) - len(text)) <= 1
        assert text.count(f"{right}:") > broken.count(f"{right}:") or f"{right}{right[-1]}" in broken or right in broken


def ended(code: int, said: str, error: BaseException | None = None) -> Result:
    return Result(CliRunner(), b"", said.encode(), said.encode(), None, code, error or SystemExit(code))


@pytest.mark.parametrize(
    ("result", "seconds", "seen"),
    [
        (ended(2, "error: recipe.yaml:1:1: x: unknown key\n"), 0.1, {"exit 2"}),
        (
            ended(1, "error: unexpected KeyError: 'x'; --debug shows the traceback\n"),
            0.1,
            {"tracebacks", "other exits"},
        ),
        (ended(2, "Traceback (most recent call last):\n"), 0.1, {"tracebacks", "exit 2", "over 6 lines"}),
        (ended(1, "", RecursionError()), 0.1, {"tracebacks", "other exits"}),
        (ended(2, "error: a\n" * 7), 0.1, {"exit 2", "over 6 lines"}),
        (ended(0, ""), 2.5, {"exit 0", "hangs"}),
        (ended(5, "error: x\n"), 0.1, {"other exits"}),
    ],
)
def test_the_row_sees_what_a_recipe_must_not_do(result, seconds, seen):
    assert set(recipes._verdict(result, seconds)) == seen


def test_the_row_sees_an_error_at_the_wrong_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 3}\n{"prompt": "c"}\n')
    kind = jsonl.KINDS["prompts"]
    assert jsonl._refused(kind, path, 2, 3) == "exact line"
    assert jsonl._refused(kind, path, 3, 3) == "wrong line"
    assert jsonl._refused(kind, path, 2, 4) == "rows lost"
    assert jsonl._read_all(kind, path, 3) == "harmless refused"
    path.write_text('{"prompt": "a"}\n')
    assert jsonl._refused(kind, path, 1, 1) == "unseen"
    assert jsonl._read_all(kind, path, 2) == "rows lost"


def test_the_row_sees_a_position_that_is_not_given(tmp_path, monkeypatch):
    monkeypatch.setitem(bad_recipes.MISTAKES, "unknown key", ("beta: 0.1", "betta: 0.1", "recipe.yaml:99:5: ", 3))
    assert bad_recipes.refused(Path(tmp_path), "unknown key") == ["without position", "wrong exit"]
