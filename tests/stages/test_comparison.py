"""Comparisons through the command: branches per seed, checkpoints on the frontier, budgets, foreign models."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.cli import main
from rlhf.errors import GuardError
from rlhf.models.tiny import build_tiny, byte_tokenizer
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.stage_run import watcher

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke"
BRANCHES = (
    "seeds=[1, 2]",
    "budget={gradient_tokens: 8000}",
    "stages.ppo.steps=50",
    "stages.ppo.save_every=1",
    "stages.dpo.epochs=50",
    "stages.duel.pairs=pairs",
)


def command(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output + result.stderr
    return result.output


@pytest.fixture(scope="module", autouse=True)
def one_core():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    sets = [word for override in BRANCHES for word in ("--set", override)]
    command("run", SMOKE / "pipeline.yaml", "--local", "--output", folder, *sets)
    return folder


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_every_method_ran_once_per_seed_and_makes_one_row(run):
    assert {path.name for path in (run / "stages").iterdir()} == {
        "sft", "pairs", "rm", "ppo@1", "ppo@2", "dpo@1", "dpo@2", "duel",
    }  # fmt: skip
    rows = {row["name"]: row for row in report(run)["candidates"]}
    assert list(rows) == ["sft", "ppo", "dpo"]
    assert [item["name"] for item in rows["ppo"]["runs"]] == ["ppo@1", "ppo@2"]
    assert rows["ppo"]["runs"][0]["gold"] != rows["ppo"]["runs"][1]["gold"]


def test_each_branch_stops_at_the_budget_and_the_report_says_what_it_spent(run):
    for name in ("ppo@1", "ppo@2", "dpo@1", "dpo@2"):
        cost = json.loads((run / "stages" / name / "done.json").read_text())["cost"]
        steps = [json.loads(line) for line in (run / "stages" / name / "metrics.jsonl").read_text().splitlines()]
        last = steps[-1]["gradient_tokens"] - steps[-2]["gradient_tokens"]
        assert 8000 <= cost["gradient_tokens"] < 8000 + last
        assert steps[-1]["gradient_tokens"] == cost["gradient_tokens"]
    rows = {row["name"]: row for row in report(run)["candidates"]}
    assert rows["dpo"]["cost"]["generated_tokens"] == 0
    assert rows["ppo"]["cost"]["generated_tokens"] > 0
    assert report(run)["budget"]["gradient_tokens"] == 8000


def test_saved_checkpoints_are_points_of_the_frontier(run):
    points = {(point["run"], point["step"]) for point in report(run)["frontier"]}
    saved = {("ppo@1", int(path.name[5:])) for path in (run / "stages" / "ppo@1" / "checkpoints").iterdir()}
    assert saved
    assert saved < points
    assert {("sft", None), ("ppo@2", None), ("dpo@1", None)} < points
    assert all(point["kl_se"] is not None for point in report(run)["frontier"])


def test_implicit_accuracy_is_there_for_every_policy_but_the_reference(run):
    accuracy = {row["name"]: row["preference_accuracy"] for row in report(run)["candidates"]}
    assert accuracy["sft"] is None
    assert 0 <= accuracy["ppo"] <= 1
    assert 0 <= accuracy["dpo"] <= 1
    assert report(run)["reward_accuracy"] is not None


def test_finished_runs_are_compared_in_one_report(run, tmp_path):
    other = tmp_path / "second"
    command("run", SMOKE / "pipeline.yaml", "--local", "--output", other, "--set", "stages.dpo.beta=0.5")
    out = tmp_path / "both.html"
    printed = command("compare", run, other, "-o", out)
    assert "first/ppo" in printed
    names = [row["name"] for row in json.loads(out.with_suffix(".json").read_text())["candidates"]]
    assert names == ["sft", "first/ppo", "first/dpo", "second/ppo", "second/dpo"]
    assert "stages.dpo.beta" in out.read_text()


def test_runs_on_other_prompts_are_not_comparable(run, tmp_path):
    other = tmp_path / "second"
    command("run", SMOKE / "compare_models.yaml", "--local", "--output", other)
    result = CliRunner().invoke(main, ["compare", str(run), str(other), "-o", str(tmp_path / "out.html")])
    assert result.exit_code == 0
    command("run", SMOKE / "compare_models.yaml", "--local", "--output", other, "--set", "stages.duel.temperature=0.5")
    result = CliRunner().invoke(main, ["compare", str(run), str(other), "-o", str(tmp_path / "out.html")])
    assert result.exit_code == 3
    assert "not compared on an equal footing: temperature is 1.0 in one and 0.5 in the other" in result.stderr


@pytest.mark.parametrize("name", ["report.json", "nowhere/report.html"])
def test_a_report_that_cannot_be_written_so_is_refused(run, tmp_path, name):
    result = CliRunner().invoke(main, ["compare", str(run), "-o", str(tmp_path / name)])
    assert result.exit_code == 2
    assert "give an HTML file in a folder that exists" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A model of another shape and another vocabulary than the recipe's."""
    folder = tmp_path_factory.mktemp("stranger")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["an"])
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    settings = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["same shape", "another shape and tokenizer"])
def test_two_models_that_nobody_trained_here(kind, stranger, tmp_path):
    folder = build_tiny(tmp_path / "model", seed=5) if kind == "same shape" else stranger
    command(
        "run", SMOKE / "compare_models.yaml", "--local", "--output", tmp_path / "out",
        "--set", f"checkpoints.challenger={folder}",
    )  # fmt: skip
    base, challenger = report(tmp_path / "out")["candidates"]
    assert (base["kl"], base["reward"]) == (0.0, None)
    assert challenger["kl"] > 0
    assert challenger["reward"] is None
    assert challenger["gold"] != base["gold"]


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def exploding(step: int) -> dict[str, float]:
    """A policy that runs away from the reference, with an entropy that goes to nothing."""
    return {"step": step, "entropy": 2.0 if step < 10 else 0.01, "kl": 0.1 if step < 20 else 50.0, "length": 10.0}


CURVE = [exploding(step) for step in range(1, 60)]


def watched(on_diagnosis: str) -> list[str]:
    recipe = load_recipe(SMOKE / "ppo_function.yaml").recipe.model_copy(update={"on_diagnosis": on_diagnosis})
    watch, said = watcher(recipe.stages[0], recipe), Said()
    logging.getLogger("rlhf").addHandler(said)
    try:
        for end in range(1, len(CURVE) + 1):
            watch(CURVE[:end])
    finally:
        logging.getLogger("rlhf").removeHandler(said)
    return said.messages


def test_each_diagnosis_is_said_once():
    names = [message.split(".")[0] for message in watched("warn")]
    assert names == ["ppo: entropy collapse", "ppo: KL blow-up"]


def test_a_diagnosis_that_makes_training_on_a_waste_stops_where_the_recipe_wants_that():
    with pytest.raises(GuardError, match=r"KL blow-up.*Try: "):
        watched("stop")
