"""No terminal is so narrow that a table loses a letter, and values that differ never look the same."""

from __future__ import annotations

import ast
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from rich.console import RenderableType

from rlhf.bench.figures import KINDS, Figure
from rlhf.bench.table import figures_table
from rlhf.commands import cache as cache_command
from rlhf.pruning import Entry
from rlhf.recipe.load import load_recipe
from rlhf.recipe.plan import make_plan
from rlhf.recipe.plan_table import render_plan
from rlhf.recipe.resources import Resources
from rlhf.report.listing import Difference, ListedRun, Listing, render_runs
from rlhf.report.states import states_table
from rlhf.report.status import RunStatus, StageStatus, render_status
from rlhf.report.table import comparison_table
from rlhf.serving import harness
from rlhf.serving.chat import Chat
from rlhf.serving.talk import Style
from rlhf.tables import told_apart
from rlhf.terminal import Terminal
from tests.report.made import comparison, samples
from tests.small_states import save

ROOT = Path(__file__).parents[1]
LONG = "runs-quickstart-with-the-long-name"
ONE, OTHER = f"{LONG}-a/ppo", f"{LONG}-b/ppo"


def printed(shown: RenderableType, width: int) -> str:
    out = io.StringIO()
    Terminal(file=out, width=width).print(shown)
    return out.getvalue()


def letters(text: str) -> Counter[str]:
    return Counter(letter for letter in text if letter.isalnum() or letter in "…_-/")


def compared() -> RenderableType:
    return comparison_table(comparison(*(samples(name) for name in ("sft", ONE, OTHER))))


def listed(count: int) -> RenderableType:
    folders = [f"/somewhere/{LONG}-{number}" for number in range(count)]
    runs = [ListedRun(folder, f"{LONG}-recipe", "done", 0.0, 3, 3, {ONE: 0.5, OTHER: 0.6}) for folder in folders]
    values = {folder: f"{number}e-5" for number, folder in enumerate(folders)}
    key = "stages.a-rather-long-name.optimizer.learning_rate"
    return render_runs(Listing("/somewhere", tuple(runs), (Difference(f"{LONG}-recipe", key, values),)))


def status() -> RenderableType:
    stages = [
        StageStatus(f"{LONG}-a", "sft", "done", "", 9, 9, {"loss": 1.0}, 60.0),
        StageStatus(f"{LONG}-b", "dpo", "failed", "training", 3, 9, {"loss": 1.0, "accuracy": 0.5}, None, None, 2, 9.0),
        StageStatus(f"{LONG}-c", "dpo", "waiting", behind=f"{LONG}-b"),
    ]
    return render_status(RunStatus("/run", "trial", "failed", False, 1, "here", 0.0, 9.0, "why", tuple(stages)))


def benched() -> RenderableType:
    return figures_table([Figure(name, 123456.0, "a device with a long name", 999999.0) for name in KINDS])


def evaluated() -> RenderableType:
    return harness.table(
        [harness.Score(model, f"{LONG}-task", "acc", 0.5, 0.1, 9) for model in (ONE, OTHER, f"{LONG}-c/ppo")]
    )


TABLES: dict[str, Callable[[], RenderableType]] = {
    "compare": compared,
    "runs": lambda: listed(2),
    "many runs": lambda: listed(9),
    "status": status,
    "bench": benched,
    "eval": evaluated,
}


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", TABLES)
def test_a_narrow_terminal_loses_no_letter(name: str, width: int) -> None:
    shown = TABLES[name]()
    narrow = printed(shown, width)
    assert max(map(len, narrow.splitlines())) <= width
    assert letters(narrow) - letters(printed(shown, 1000)) == Counter()
    assert letters(printed(shown, 1000)) - letters(narrow) == Counter()


@pytest.mark.parametrize("width", [60, 80])
def test_states_and_the_cache_lose_none_either(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for end in ("a", "b"):
        save(tmp_path / "stages" / f"{LONG}-{end}" / "state", 1)
    made = states_table(tmp_path)
    assert made is not None
    assert letters(printed(made, width)) == letters(printed(made, 1000))
    found = [Entry("tokens", tmp_path / f"{LONG}-{end}", 1, 0.0, True) for end in ("a", "b")]
    shown: list[RenderableType] = []
    monkeypatch.setattr(Terminal, "print", lambda _, what, **options: shown.append(what))
    cache_command._show(tmp_path, found)
    monkeypatch.undo()
    assert letters(printed(shown[0], width)) == letters(printed(shown[0], 1000))


@pytest.mark.parametrize("width", [100, 140])
def test_a_plan_names_its_stages_whole(width: int, tmp_path: Path) -> None:
    """`rlhf plan` takes at least a hundred columns."""
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    stages = [
        {"name": f"{LONG}-{end}", "kind": "sft", "data": {"path": "chats.jsonl"}, "batch_size": 1} for end in ("a", "b")
    ]
    model = {"path": "tiny://llama", "dtype": "float32"}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "one", "model": model, "stages": stages}))
    made = render_plan(make_plan(load_recipe(tmp_path / "recipe.yaml"), Resources(2, 0, 2**34, 2**34)))
    narrow = printed(made, width)
    assert letters(narrow) == letters(printed(made, 1000))


@pytest.mark.parametrize(
    "texts",
    [
        [f"{'a' * 200}{end}" for end in "xyz"],
        [f"{start}{'a' * 200}" for start in "xyz"],
        [f"{'a' * 100}{middle}{'b' * 100}" for middle in ("x", "y", "x")],
        ["a" * 200, "a" * 201, "a" * 202],
        ["s" + "m" * 70 + str(n) + "m" * 70 + "e" for n in (1, 2)] + ["short"],
        ["x" * 300, "y" * 300, "x" * 150 + "z" + "x" * 149],
        ["", "a" * 300],
    ],
)
def test_values_that_differ_look_different(texts: list[str]) -> None:
    short = told_apart(texts)
    assert max(map(len, short)) <= 60 + len(" #123456")
    for (one, text), (two, other) in combinations(zip(short, texts, strict=True), 2):
        assert (one == two) == (text == other)


def test_short_values_stay_as_they_are() -> None:
    assert told_apart(["1e-5", "1e-4", "-"]) == ["1e-5", "1e-4", "-"]
    assert told_apart([f"{'a' * 90}1", f"{'a' * 90}2"]) == [f"…{'a' * 12}1", f"…{'a' * 12}2"]
    assert told_apart([]) == []


@pytest.mark.parametrize("width", [40, 80])
def test_two_talkers_with_long_names_stay_apart(width: int) -> None:
    class Talker:
        def __init__(self, name: str) -> None:
            self.name = name

        def reply(self, messages: object, style: Style) -> list[str]:
            return ["yes"]

    out = io.StringIO()
    Chat([Talker(ONE * 2), Talker(OTHER * 2)], Style(), Terminal(file=out, width=width)).ask("?")  # type: ignore[list-item]
    assert "…" not in out.getvalue()
    assert letters(out.getvalue())["q"] == 2 * letters(ONE * 2)["q"]


def test_every_table_is_a_whole_one() -> None:
    for path in sorted(path for package in ("rlhf", "actors") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                named = {keyword.arg for keyword in node.keywords}
                assert name != "Table", f"{os.fspath(path)}:{node.lineno}: use rlhf.tables.WholeTable"
                assert not (name == "add_column" and named & {"no_wrap", "overflow"}), f"{path}:{node.lineno}"
