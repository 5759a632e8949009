"""What leaves the machine says nothing of it: no absolute path, no home, no query and no user of a URL."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.privacy import public, public_text
from rlhf.recipe.load import load_recipe
from rlhf.report.html import write_html
from rlhf.sinks.base import told

sys.path.append(str(Path(__file__).parent / "report"))
from made import comparison, samples

HOME = Path("/home/zebediah")
RECIPE = """\
name: trial
output_dir: {folder}/runs
model: {{path: "{folder}/models/base", chat_template: {folder}/chat.jinja}}
checkpoints: {{theirs: {folder}/models/theirs}}
tracking: {{trackio: {{project: alignment}}}}
stages:
  - {{name: sft, kind: sft, data: {{path: {folder}/sft.jsonl}}}}
  - name: pairs
    kind: annotate
    policy: sft
    prompts: {{path: {folder}/prompts.jsonl}}
    judge: {{kind: http, url: "https://judge.example/score?key=hidden-query"}}
  - name: more
    kind: annotate
    policy: sft
    prompts: {{path: {folder}/prompts.jsonl}}
    judge:
      kind: llm
      model: any
      url: "http://llm.example/v1?api-version=hidden-query#hidden-query"
      criteria: 'As in "{folder}/rules.txt" or /home/zebediah/rules, see https://me:word@wiki.example/x?t=hidden-query'
  - name: duel
    kind: compare
    candidates: [sft, theirs]
    baseline: sft
    prompts: {{path: {folder}/prompts.jsonl}}
    gold: {{kind: function, path: "{folder}/judge.py:score"}}
"""


@pytest.fixture(autouse=True)
def zebediah(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(HOME))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name in ("sft.jsonl", "prompts.jsonl", "chat.jinja"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "judge.py").write_text("def score(prompt, response, metadata): return 0.0\n")
    for name in ("base", "theirs"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path / "recipe.yaml"


def texts(value: Any) -> Iterator[str]:
    """Yield every text in plain values, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts(key)
            yield from texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def check(text: str, folder: Path) -> None:
    for private in (str(folder), "hidden-query", "zebediah", "me:word", "word@"):
        assert private not in text, text[:300]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/zebediah/models/base", "base"),
        ("/data/my models/base (float32)", "base (float32)"),
        ("../../zebediah/judge.py:score", "judge.py:score"),
        ("~/judge.py:score", "judge.py:score"),
        ("runs/quickstart", "runs/quickstart"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("tiny://llama?layers=2", "tiny://llama?layers=2"),
        ("https://me:word@host:8000/v1?key=x#y", "https://host:8000/v1"),
        ("HTTP://host?key=x", "http://host"),
        ("file:///home/zebediah/x.bin", "x.bin"),
        ("s3://bucket/x?token=y", "s3://bucket/x"),
        ("http://[broken?key=x", "(a URL)"),
        ("[{'path': '/data/secret/x.jsonl'}]", "[{'path': 'x.jsonl'}]"),
        ("see /home/zebediah/notes", "see ~/notes"),
        ("1/10 and/or 2/10", "1/10 and/or 2/10"),
        ("", ""),
    ],
)
def test_a_text_keeps_what_is_not_of_the_machine(text: str, shown: str) -> None:
    assert public_text(text) == shown


def test_values_are_made_public_at_every_depth() -> None:
    found = public({"/a/b": [Path("/c/d"), ("https://h/?k=1", 2.5, None, True)]})
    assert found == {"b": ["d", ["https://h/", 2.5, None, True]]}


def test_sinks_are_told_nothing_of_the_machine(recipe: Path) -> None:
    found = list(texts(told(load_recipe(recipe).recipe)))
    assert {"base", "theirs", "sft.jsonl", "judge.py:score", "https://judge.example/score"} <= set(found)
    for text in found:
        check(text, recipe.parent)


def test_the_report_says_nothing_of_the_machine(recipe: Path, tmp_path: Path) -> None:
    plain = load_recipe(recipe).recipe.model_dump(mode="json")
    other = json.loads(json.dumps(plain).replace("models/base", "models/more/base").replace("hidden-query", "other"))
    facts = {"Model": f"{tmp_path}/models/base (float32)", "Judge": "https://judge.example/score?key=hidden-query"}
    candidates = [samples("sft"), samples("ppo")]
    page = tmp_path / "report.html"
    runs = {str(tmp_path / "one"): plain, str(tmp_path / "two"): other}
    write_html(page, comparison(*candidates), {}, candidates, facts, recipes=runs, environment={"torch": str(tmp_path)})
    text = page.read_text()
    assert "base (float32)" in text
    assert "base (1)" in text
    assert "base (2)" in text
    assert "https://judge.example/score" in text
    check(text, tmp_path)


def test_the_leaderboard_says_nothing_of_the_machine(tmp_path: Path) -> None:
    from rlhf.report.wins import write_leaderboard

    write_leaderboard(tmp_path / "leaderboard.csv", comparison(samples("sft"), samples("ppo")))
    rows = list(csv.reader((tmp_path / "leaderboard.csv").read_text().splitlines()))
    assert {row[0] for row in rows[1:]} == {"sft", "ppo"}
    for row in rows:
        for cell in row:
            check(cell, tmp_path)
