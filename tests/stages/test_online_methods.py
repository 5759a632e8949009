"""Every online method learns a known reward from the same start; what else they do shows in their metrics."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from rlhf.local import LocalLauncher
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe_run import run_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = ["grpo", "dr_grpo", "rloo", "reinforce", "reinforce_group", "online_dpo", "ppo", "dapo"]
SHARED = {
    "reward", "reward_std", "kl", "length", "unfinished", "entropy", "agreement", "agreement_max", "grad_norm",
    "skipped_steps", "tokens_per_second", "gradient_tokens", "generated_tokens",
}  # fmt: skip


def run(folder: Path, name: str, *overrides: str) -> None:
    loaded = load_recipe(RECIPES / "smoke" / name, overrides)
    with pytest.MonkeyPatch.context() as patch:  # threads that wait for each other crawl on a busy machine
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        run_recipe(loaded, LocalLauncher, folder, Console(quiet=True))


def rows(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    run(folder, "online.yaml")
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_every_method_improves_the_reward(finished: Path, name: str) -> None:
    steps = rows(finished, name)
    rewards = [row["reward"] for row in steps]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.25
    assert all(row["skipped_steps"] == 0 and row.get("agreement", 0) < 1e-5 for row in steps)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert set(steps[0]) >= SHARED


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_a_model_samples_and_its_costs(finished: Path, name: str) -> None:
    stage = finished / "stages" / name
    assert AutoModelForCausalLM.from_pretrained(stage / "model").config.vocab_size == 262
    samples = [json.loads(line) for line in (stage / "samples" / "step-00010.jsonl").read_text().splitlines()]
    assert len(samples) == 64
    steps, cost = rows(finished, name), json.loads((stage / "done.json").read_text())["cost"]
    assert (cost["gradient_tokens"], cost["generated_tokens"]) == (
        steps[-1]["gradient_tokens"],
        steps[-1]["generated_tokens"],
    )
    responses = sum(64 * row["length"] for row in steps)
    if name != "dapo":
        assert cost["generated_tokens"] == pytest.approx(responses)
    if name == "online_dpo":
        assert 0 < cost["gradient_tokens"] < 10 * 16 * (64 + 12)
    else:
        passes = {"ppo": 2 * 2}.get(name, 1)  # PPO: two epochs, policy and critic
        assert cost["gradient_tokens"] > passes * responses
        assert cost["gradient_tokens"] % passes == 0


def test_metrics_of_the_methods_own(finished: Path) -> None:
    assert all(row["flat_groups"] <= 0.5 for name in ("grpo", "rloo", "dapo") for row in rows(finished, name))
    assert "flat_groups" not in rows(finished, "ppo")[0]
    assert "flat_groups" not in rows(finished, "reinforce")[0]
    assert "kl_loss" in rows(finished, "grpo")[0]
    assert "kl_loss" not in rows(finished, "rloo")[0]
    assert all(row["redrawn"] >= 0 for row in rows(finished, "dapo"))
    pairs = rows(finished, "online_dpo")
    assert all(0 < row["pairs"] <= 8 for row in pairs)
    assert {"loss", "accuracy", "margin", "chosen_logprob"} <= set(pairs[0])


def test_ppo_s_kl_coef_goes_down_below_the_target_and_up_above_it(finished: Path) -> None:
    steps = rows(finished, "ppo")
    for row, following in pairwise(steps):
        assert (following["kl_coef"] > row["kl_coef"]) == (row["kl"] > 20)
    assert steps[1]["kl_coef"] == pytest.approx(0.002 * (1 - 0.2 * 64 / 640))


@pytest.mark.parametrize(
    ("limit", "steps"),
    [("generated_tokens: 1", 1), ("gradient_tokens: 1", 1), ("accelerator_seconds: 1.0e-9", 0)],
)
def test_a_budget_ends_the_stage_before_its_steps(tmp_path: Path, limit: str, steps: int) -> None:
    run(tmp_path, "ppo_function.yaml", f"budget={{{limit}}}", "stages.ppo.save_every=1")
    done = json.loads((tmp_path / "stages" / "ppo" / "done.json").read_text())
    assert done["summary"]["steps"] == steps
    assert (tmp_path / "stages" / "ppo" / "model" / "config.json").exists()
    saved = tmp_path / "stages" / "ppo" / "checkpoints"
    assert [path.name for path in sorted(saved.glob("*"))] == [f"step-{n + 1}" for n in range(steps)]
