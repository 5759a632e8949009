"""A folder with a complete recipe and the files it names."""

import textwrap
from pathlib import Path

import pytest

from rlhf.recipe.load import LoadedRecipe, load_recipe

TEXT = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
stages:
  - name: sft
    kind: sft
    data: {path: data/sft.jsonl}
  - name: pairs
    kind: annotate
    policy: sft
    prompts: {path: data/prompts.jsonl}
    judge: {kind: function, path: "rewards.py:score"}
  - name: rm
    kind: reward
    init: sft
    data: {stage: pairs}
  - name: ppo
    kind: ppo
    policy: sft
    reward: {kind: model, stage: rm}
    prompts: {path: data/prompts.jsonl}
    steps: 3
    prompts_per_step: 8
    samples_per_prompt: 2
    minibatch_size: 6
  - name: dpo
    kind: dpo
    policy: sft
    data: {stage: pairs}
  - name: duel
    kind: compare
    candidates: [sft, ppo, dpo]
    baseline: sft
    prompts: {path: data/heldout.jsonl}
    gold: {kind: function, path: "rewards.py:score"}
    reward: {kind: model, stage: rm}
"""


class Folder:
    """Where a test writes its recipe, read by the name `recipe.yaml` from inside that folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        return file

    def load(self, text: str = TEXT, *overrides: str) -> LoadedRecipe:
        self.write("recipe.yaml", text)
        return load_recipe(Path("recipe.yaml"), overrides)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = Folder(tmp_path)
    made.write("data/sft.jsonl", '{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    made.write("data/prompts.jsonl", '{"prompt": "x"}\n' * 10)
    made.write("data/heldout.jsonl", '{"prompt": "y"}\n' * 4)
    made.write("rewards.py", "def score(prompt, response, metadata):\n    return 0.0\n")
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def text():
    return TEXT
