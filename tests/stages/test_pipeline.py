"""The whole smoke pipeline in this process: every stage, its files, and what must be true of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.pairs import read_pairs
from rlhf.local import LocalLauncher
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe_run import run_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def run(name: str, folder: Path, *overrides: str) -> str:
    """Run a smoke recipe locally and return what it printed."""
    loaded = load_recipe(RECIPES / "smoke" / name, overrides)
    console = Console(record=True, width=200, force_terminal=False)
    with pytest.MonkeyPatch.context() as patch:  # threads that wait for each other crawl on a busy machine
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        run_recipe(loaded, LocalLauncher, folder, console)
    return console.export_text()


def rows(folder: Path, stage: str) -> list[dict]:
    """Return what each step logged; before the first one, held-out rows alone were evaluated."""
    lines = (folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["step"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run("pipeline.yaml", folder)


def test_every_stage_finishes(finished):
    folder, printed = finished
    for stage in ("sft", "pairs", "rm", "ppo", "dpo", "duel"):
        assert json.loads((folder / "stages" / stage / "done.json").read_text())["key"]
        assert f"{stage}: done in" in printed


def test_sft_loss_falls(finished):
    losses = [row["loss"] for row in rows(finished[0], "sft")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("stage", "metric"), [("sft", "loss"), ("rm", "accuracy"), ("dpo", "margin")])
def test_held_out_rows_are_evaluated_before_after_and_at_the_end_of_every_epoch(finished, stage, metric):
    folder, _ = finished
    lines = (folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    losses = {row["step"]: row["heldout_loss"] for row in map(json.loads, lines) if f"heldout_{metric}" in row}
    epochs = {"sft": 2, "rm": 3, "dpo": 1}[stage]
    last = rows(folder, stage)[-1]["step"]
    assert list(losses) == [last * epoch // epochs for epoch in range(epochs + 1)]
    done = json.loads((folder / "stages" / stage / "done.json").read_text())["summary"]
    assert done["heldout_loss"] == losses[done["kept_step"]] == min(list(losses.values())[1:])
    assert "loss" not in json.loads(lines[0])


def test_models_load_with_plain_transformers(finished):
    folder, _ = finished
    for stage in ("sft", "ppo", "dpo"):
        model = AutoModelForCausalLM.from_pretrained(folder / "stages" / stage / "model")
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    model = AutoModelForSequenceClassification.from_pretrained(folder / "stages" / "rm" / "model")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 1)


def test_training_changed_each_policy(finished):
    folder, _ = finished

    def weight(stage: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder / "stages" / stage / "model")
        return model.model.layers[0].self_attn.q_proj.weight

    for stage in ("ppo", "dpo"):
        assert not torch.equal(weight(stage), weight("sft"))


def test_pairs_carry_tokens_scores_and_stated_noise(finished):
    pairs = read_pairs(finished[0] / "stages" / "pairs" / "pairs.jsonl")
    assert {pair.heldout for pair in pairs} == {True, False}
    for pair in pairs:
        assert (pair.chosen_score < pair.rejected_score) == pair.flipped
        assert pair.chosen_tokens != pair.rejected_tokens
    trained = {pair.prompt_id for pair in pairs if not pair.heldout}
    assert not trained & {pair.prompt_id for pair in pairs if pair.heldout}


def test_reward_scores_are_standardised_over_training_responses(finished):
    folder, _ = finished
    done = json.loads((folder / "stages" / "rm" / "done.json").read_text())["summary"]
    assert done["train_accuracy"] > 0.6
    assert {"heldout_accuracy", "judge_accuracy", "gold_accuracy"} <= done.keys()


def test_ppo_leaves_ratio_one_and_agrees_with_the_engine(finished):
    steps = rows(finished[0], "ppo")
    assert len(steps) == 6
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["kl"] > 1e-3
    assert all(row.get("agreement", 0) < 1e-5 for row in steps)
    assert any(abs(row["ratio"] - 1) > 1e-4 for row in steps)
    assert all(row["skipped_steps"] == 0 for row in steps)


def test_report_lists_candidates_and_paired_differences(finished):
    folder, printed = finished
    report = json.loads((folder / "report.json").read_text())
    assert [c["name"] for c in report["candidates"]] == ["sft", "ppo", "dpo"]
    for candidate in report["candidates"]:
        assert {"gold", "gold_ci", "reward", "kl", "length", "win_rate", "win_rate_ci"} <= candidate.keys()
    baseline = report["candidates"][0]
    assert baseline["kl"] == 0
    assert baseline["win_rate"] == 0.5
    assert {d["candidate"] for d in report["differences"]} == {"ppo", "dpo"}
    retained = {c["name"]: c["retention"] for c in report["candidates"]}
    assert retained["sft"]["difference"] is None
    for name in ("ppo", "dpo"):
        gap = retained[name]["nll"] - retained["sft"]["nll"]
        assert retained[name]["difference"]["difference"] == pytest.approx(gap)
        assert (retained[name]["chats"], retained[name]["difference"]["n"]) == (12, 12)
    assert (folder / "report.html").stat().st_size > 100_000
    assert "report.html" in printed


def test_second_run_reuses_everything_and_a_change_only_what_follows(finished):
    folder, _ = finished
    printed = run("pipeline.yaml", folder)
    assert printed.count("unchanged, reused") == 6
    printed = run("pipeline.yaml", folder, "stages.dpo.beta=0.2")
    assert printed.count("unchanged, reused") == 4
    assert "dpo: done in" in printed
    assert "duel: done in" in printed


def test_ppo_against_a_function_improves_it(tmp_path):
    run("ppo_function.yaml", tmp_path)
    rewards = [row["reward"] for row in rows(tmp_path, "ppo")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.5


def test_checkpoints_are_saved_when_asked(tmp_path):
    run("ppo_function.yaml", tmp_path, "stages.ppo.steps=2", "stages.ppo.save_every=1")
    saved = sorted(p.name for p in (tmp_path / "stages" / "ppo" / "checkpoints").iterdir())
    assert saved == ["step-1", "step-2"]
