"""The estimate of a run's duration, on files whose tokens are counted by hand."""

from pathlib import Path

import pytest

from rlhf.recipe.duration import (
    BYTES_PER_TOKEN,
    FILLED,
    PROCESS_S,
    STAGE_S,
    STEP_S,
    TRAINING,
    estimate_seconds,
    stage_work,
)
from rlhf.recipe.load import load_recipe
from rlhf.recipe.model_shape import ModelShape
from rlhf.recipe.row_lengths import RowLengths

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPE = ModelShape(
    parameters=1000,
    lm_head=0,
    hidden=4,
    intermediate=8,
    layers=2,
    heads=1,
    q_width=4,
    kv_width=4,
    vocabulary=100,
    linears={},
    biases=0,
    layer_sizes=(300, 300),
    last_norm=0,
)
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
    work = stage_work(recipe, recipe.stages[0], {})
    assert work is not None
    assert work.trained == pytest.approx(tokens)
    seconds = estimate_seconds(recipe, SHAPE, 1e6, {})
    products = 6 * tokens * 600 + 6 * tokens / 2 * 400  # the layers, and the head for half of the tokens
    assert seconds == pytest.approx(PROCESS_S + STAGE_S + 3 * STEP_S + products / (1e6 * TRAINING))


def test_measured_rows_count_as_they_are(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    (tmp_path / "one.yaml").write_text(SFT)
    recipe = load_recipe(tmp_path / "one.yaml").recipe
    work = stage_work(recipe, recipe.stages[0], {"stages.sft.data": RowLengths(7.5, 11, complete=False)})
    assert work.trained == 3 * 5 * 7.5


def test_pairs_share_their_prompt_and_every_model_of_ppo_counts():
    recipe = load_recipe(RECIPES / "quickstart.yaml").recipe
    lengths = {f"stages.{name}.prompts": RowLengths(20, 25, complete=True) for name in ("pairs", "ppo", "duel")}
    work = {stage.name: stage_work(recipe, stage, lengths) for stage in recipe.stages}
    answer = FILLED * 24
    assert work["dpo"].trained == pytest.approx(256 * (20 + 2 * answer))
    assert work["dpo"].trained_words == pytest.approx(256 * 2 * answer)
    assert work["rm"].trained_words == 0
    ppo = next(stage for stage in recipe.stages if stage.name == "ppo")
    rollouts = ppo.steps * ppo.prompts_per_step
    assert work["ppo"].generated == pytest.approx(rollouts * answer)
    assert work["ppo"].trained == pytest.approx(2 * ppo.epochs * rollouts * (20 + answer))  # policy and critic
    assert work["ppo"].scored == pytest.approx(4 * rollouts * (20 + answer))  # and reference, reward model
    assert work["duel"].generated == pytest.approx(3 * 128 * answer)


def test_unknown_when_the_data_is_not_local_jsonl(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "one.yaml").write_text(SFT.replace("rows.jsonl", "rows.csv"))
    recipe = load_recipe(tmp_path / "one.yaml").recipe
    assert estimate_seconds(recipe, SHAPE, 1e6, {}) is None
