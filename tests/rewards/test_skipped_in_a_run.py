"""A run whose reward service has no scores for one prompt: left out of pairs and steps, and counted; or the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from local_server import Answer, LocalServer
from rich.console import Console

from rlhf.data.pairs import read_pairs
from rlhf.errors import TrainingError
from rlhf.local import LocalLauncher
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe_run import run_recipe

RECIPE = """\
name: lossy
model: {{path: "tiny://llama", dtype: float32}}
tuning: {{kind: lora, r: 4, alpha: 8}}
roles: {{rollout: {{engine: transformers}}}}
stages:
  - {{name: pairs, kind: annotate, policy: base, prompts: {{path: p.jsonl}}, judge: {judge}, samples_per_prompt: 2,
     max_prompt_tokens: 32, max_response_tokens: 4, heldout_fraction: 0}}
  - {{name: rl, kind: {kind}, policy: base, reward: {judge}, prompts: {{path: p.jsonl}}, steps: 2, prompts_per_step: 4,
     samples_per_prompt: 2, minibatch_size: 4, max_prompt_tokens: 32, max_response_tokens: 4}}
"""


def answer(_: int, body: Any) -> Answer:
    items = body["items"]
    if any("lost" in item["prompt"] for item in items):
        return Answer({"error": "cannot score that"}, 422)
    return Answer({"scores": [sum(map(ord, item["response"])) % 97 / 10 for item in items]})


def run(folder: Path, kind: str, **settings: Any) -> Path:
    words = ("one", "two", "lost", "four")
    (folder / "p.jsonl").write_text("".join(f'{{"prompt": "{word}", "id": "{word}"}}\n' for word in words))
    with LocalServer(answer) as server, pytest.MonkeyPatch.context() as patch:
        judge = json.dumps({"kind": "http", "url": server.url, "batch_size": 2, **settings})
        (folder / "r.yaml").write_text(RECIPE.format(judge=judge, kind=kind))
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        recipe = load_recipe(folder / "r.yaml", ())
        return run_recipe(recipe, LocalLauncher, folder / "run", Console(record=True, width=200)) / "stages"


@pytest.mark.parametrize("kind", ["ppo", "online_dpo"])
def test_one_prompt_is_left_out_and_counted(tmp_path, kind):
    stages = run(tmp_path, kind, on_error="skip_group", max_skipped=0.25)
    pairs = read_pairs(stages / "pairs" / "pairs.jsonl")
    assert {pair.prompt_id for pair in pairs} == {"one", "two", "four"}
    assert json.loads((stages / "pairs" / "done.json").read_text())["summary"]["skipped_prompts"] == 1
    rows = [json.loads(line) for line in (stages / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_groups"] for row in rows] == [1, 1]
    assert all(value is not None for row in rows for value in row.values())
    for sample in (stages / "rl" / "samples").iterdir():
        ids = [json.loads(line)["prompt_id"] for line in sample.read_text().splitlines()]
        assert sorted(ids) == ["four", "four", "one", "one", "two", "two"]


@pytest.mark.parametrize("settings", [{"on_error": "skip_group", "max_skipped": 0.2}, {}])
def test_or_the_run_ends_with_what_the_service_said(tmp_path, settings):
    said = r'^stage pairs: .*status 422: \{"error": "cannot score that"\} \(after 1 attempt, first prompt id lost\)$'
    with pytest.raises(TrainingError, match=said):
        run(tmp_path, "grpo", **settings)
