"""The estimate of a run's duration, on files whose tokens are counted by hand."""

from pathlib import Path

import pytest

from rlhf.recipe.duration import BYTES_PER_TOKEN, FILLED, PROCESS_S, STAGE_S, TRAINING, estimate_seconds, stage_work
from rlhf.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SFT = """
name: one
model: {path: "tiny://llama"}
tuning: {kind: full}
stages:
  - {name: sft, kind: sft, data: {path: rows.jsonl}, epochs: 3}
"""


def test_sft_by_hand(tmp_path):
    line = '{"prompt": "a", "completion": "b"}'
    (tmp_path / "rows.jsonl").write_text(f"{line}\n{line}\n")
    (tmp_path / "one.yaml").write_text(SFT)
    recipe = load_recipe(tmp_path / "one.yaml").recipe
    tokens = 3 * 2 * len(line) / BYTES_PER_TOKEN
    work = stage_work(recipe, recipe.stages[0])
    assert work is not None
    assert work.trained == pytest.approx(tokens)
    seconds = estimate_seconds(recipe, 1000, 1e6)
    assert seconds == pytest.approx(PROCESS_S + STAGE_S + tokens * 6 * 1000 / (1e6 * TRAINING))


def test_generation_follows_the_rollouts():
    recipe = load_recipe(RECIPES / "quickstart.yaml").recipe
    work = {stage.name: stage_work(recipe, stage) for stage in recipe.stages}
    ppo = next(stage for stage in recipe.stages if stage.name == "ppo")
    rollouts = ppo.steps * ppo.prompts_per_step * ppo.samples_per_prompt
    assert work["ppo"].generated == pytest.approx(rollouts * FILLED * ppo.max_response_tokens)
    assert work["duel"].generated == pytest.approx(3 * 128 * FILLED * 24)


def test_unknown_when_the_data_is_not_local_jsonl(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "one.yaml").write_text(SFT.replace("rows.jsonl", "rows.csv"))
    recipe = load_recipe(tmp_path / "one.yaml").recipe
    assert estimate_seconds(recipe, 1000, 1e6) is None
