"""Every method of training on preferences, in this process: it learns, saves, counts and stops as it should."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console
from test_pipeline import RECIPES, rows, run
from transformers import AutoModelForCausalLM

from rlhf.data.pairs import read_pairs
from rlhf.errors import DataError, RecipeError
from rlhf.interrupts import Interrupts
from rlhf.local import LocalLauncher, LocalModel
from rlhf.progress import Display
from rlhf.recipe.load import load_recipe
from rlhf.recipe.schema import Recipe
from rlhf.stage_run import STAGES
from rlhf.stages.context import StageContext
from rlhf.stages.recovery import StageRecovery
from rlhf.tracking import Tracker

METHODS = ("dpo", "cdpo", "dpo_length", "dpo_nll", "robust", "ipo", "hinge", "simpo", "orpo", "kto")
METRICS = {
    "loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob", "chosen_reward", "rejected_reward",
    "grad_norm", "skipped_steps", "learning_rate", "tokens_per_second", "gradient_tokens",
}  # fmt: skip


def done(folder: Path, stage: str) -> dict:
    return json.loads((folder / "stages" / stage / "done.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    run("preference.yaml", folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_each_method_improves_the_gold_reward_on_held_out_prompts(finished, method):
    golds = done(finished, "duel")["summary"]
    assert golds[method] > golds["sft"] + 0.05


@pytest.mark.parametrize("method", METHODS)
def test_each_method_prefers_the_chosen_of_held_out_pairs(finished, method):
    summary = done(finished, method)["summary"]
    assert summary["heldout_margin"] > 0
    if method != "kto":  # whose accuracy is against its reference point, below which both of a pair may fall
        assert summary["heldout_accuracy"] > 0.55


@pytest.mark.parametrize("method", METHODS)
def test_each_method_logs_the_same_metrics(finished, method):
    steps = rows(finished, method)
    assert set(steps[0]) >= METRICS
    assert all(row["skipped_steps"] == 0 for row in steps)
    assert done(finished, method)["summary"].keys() >= {f"heldout_{name}" for name in ("loss", "accuracy", "margin")}


@pytest.mark.parametrize(("method", "first"), [("dpo", 0.6931), ("robust", 0.6931), ("hinge", 1.0), ("ipo", 1.0)])
def test_the_first_step_starts_at_the_reference(finished, method, first):
    """There all log-ratios are 0; IPO's target of 1 / (2 beta) is 1."""
    step = rows(finished, method)[0]
    assert step["loss"] == pytest.approx(first, abs=1e-4)
    assert step["margin"] == pytest.approx(0, abs=1e-4)
    assert step["accuracy"] == pytest.approx(0.5, abs=0.3)  # ties, but for pairs that rounding decides


def test_kto_starts_at_half_the_weight_with_no_kl(finished):
    step = rows(finished, "kto")[0]
    assert step["loss"] == pytest.approx(0.5, abs=1e-4)
    assert step["kl"] == pytest.approx(0, abs=1e-4)


def test_gradient_tokens_are_those_of_both_sides(finished):
    pairs = [pair for pair in read_pairs(finished / "stages" / "pairs" / "pairs.jsonl") if not pair.heldout]
    tokens = sum(2 * len(p.prompt_tokens) + len(p.chosen_tokens) + len(p.rejected_tokens) for p in pairs)
    for method in METHODS:
        assert done(finished, method)["cost"]["gradient_tokens"] == tokens
        assert rows(finished, method)[-1]["gradient_tokens"] == tokens


def test_two_rounds_of_dpo_improve_twice(tmp_path):
    run("iterative_dpo.yaml", tmp_path)
    golds = done(tmp_path, "duel")["summary"]
    assert golds["sft"] + 0.05 < golds["dpo1"] < golds["dpo2"] - 0.05
    assert rows(tmp_path, "dpo2")[0]["margin"] == pytest.approx(0, abs=1e-4)


@pytest.fixture(autouse=True)
def one_part_for_each_group(monkeypatch):
    monkeypatch.setattr("rlhf.stages.reference_cache.CPU_PART_TOKENS", 1 << 18)


@dataclass
class CountingLauncher(LocalLauncher):
    """Counts how often the policy is asked for log-probabilities."""

    recipe: Recipe
    asked: list[int] = field(default_factory=list)

    def policy(self, spec):
        model = LocalModel(spec)
        ask = model.logprobs

        def logprobs(batch):
            self.asked.append(len(batch))
            return ask(batch)

        model.logprobs = logprobs
        return model


def run_stage(method: str, finished: Path, folder: Path, *overrides: str) -> tuple[dict, CountingLauncher]:
    """Run one method again from the finished start and pairs; return its summary and the launcher."""
    recipe = load_recipe(RECIPES / "smoke" / "preference.yaml", overrides).recipe
    stage = next(stage for stage in recipe.stages if stage.name == method)
    launcher = CountingLauncher(recipe)
    target = folder / "stages" / method
    target.mkdir(parents=True)
    with Display(Console(quiet=True)) as display:
        tracker = Tracker(method, target, display, None)
        context = StageContext(
            recipe=recipe,
            stage=stage,
            folder=target,
            outputs={name: finished / "stages" / name for name in ("sft", "pairs")},
            launcher=launcher,
            tracker=tracker,
            threads={"policy": 1},
            max_length=80,
            devices=1,
            recovery=StageRecovery(target / "state", "", {}, recipe.recovery, tracker, Interrupts()),
        )
        return STAGES[stage.kind](stage, context), launcher


@pytest.mark.parametrize(("method", "passes"), [("ipo", 2), ("simpo", 0), ("orpo", 0)])
def test_a_loss_without_a_reference_asks_for_none_and_the_others_once(finished, tmp_path, monkeypatch, method, passes):
    """Both sides of the pairs to train on, and of those held out; none of them again in a second epoch."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    _, launcher = run_stage(method, finished, tmp_path, f"stages.{method}.epochs=2")
    assert len(launcher.asked) == passes


ONE_STEP = "budget.gradient_tokens=1"


def test_another_loss_on_the_same_pairs_asks_the_reference_nothing_and_learns_the_same(finished, tmp_path, monkeypatch):
    """What IPO learns does not depend on whose pass the reference's logprobs come from, to the last bit."""
    found = {}
    for folder, first in (("alone", ()), ("after", ("dpo",))):
        monkeypatch.setenv("RLHF_CACHE", str(tmp_path / folder / "cache"))
        for method in first:
            run_stage(method, finished, tmp_path / folder, ONE_STEP)
        summary, launcher = run_stage("ipo", finished, tmp_path / folder)
        model = tmp_path / folder / "stages" / "ipo" / "model" / "model.safetensors"
        steps = [row["margin"] for row in rows(tmp_path / folder, "ipo")]
        found[folder] = (len(launcher.asked), summary, steps, model.read_bytes())
    (passes, *alone), (passes_after, *after) = found.values()
    assert (passes, passes_after) == (2, 0)
    assert after == alone


def test_kto_on_the_same_pairs_asks_for_its_mismatches_alone(finished, tmp_path, monkeypatch):
    """Its own responses are both sides of the pairs, which DPO has asked for."""
    asked = {}
    for folder, first in (("alone", ()), ("after", ("dpo",))):
        monkeypatch.setenv("RLHF_CACHE", str(tmp_path / folder / "cache"))
        for method in (*first, "kto"):
            _, launcher = run_stage(method, finished, tmp_path / folder, ONE_STEP)
        asked[folder] = launcher.asked
    assert asked["after"] == [asked["alone"][1], *asked["alone"][3:]]
    # For the cache; for the held-out rows before the step, for the step, for the held-out rows and pairs after it.
    assert len(asked["alone"]) == 4 + 1 + 1 + 2


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_checkpoints_are_saved_every_so_many_steps(finished, tmp_path, method):
    run_stage(method, finished, tmp_path, f"stages.{method}.save_every=20")
    folder = tmp_path / "stages" / method / "checkpoints"
    steps = len(rows(finished, method))
    assert {path.name for path in folder.iterdir()} == {f"step-{n}" for n in range(20, steps + 1, 20)}
    AutoModelForCausalLM.from_pretrained(folder / "step-20")


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_training_stops_at_the_budget(finished, tmp_path, method):
    total = done(finished, method)["cost"]["gradient_tokens"]
    run_stage(method, finished, tmp_path, f"budget.gradient_tokens={total // 2}")
    used = rows(tmp_path, method)
    assert len(used) < 0.6 * len(rows(finished, method))
    assert used[-2]["gradient_tokens"] < total // 2 <= used[-1]["gradient_tokens"]
    assert used[-1]["learning_rate"] < 0.2 * used[0]["learning_rate"]
    assert (tmp_path / "stages" / method / "model" / "config.json").is_file()


LIKED = [("cab", True), ("fade", True), ("zzzz", False), ("tux", False), ("bead", True), ("wry", False)]
FILES = {
    "kto": [{"prompt": f"Say {n}", "completion": text, "label": good} for n, (text, good) in enumerate(LIKED * 6)],
    "preference": [{"prompt": f"Say {n}", "chosen": "bead", "rejected": "tux"} for n in range(20)],
}


def from_file(tmp_path: Path, lines: list[dict], **settings: str) -> tuple[str, ...]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = json.dumps({"path": str(path), **settings})
    return (f"stages.kto.data={data}", "stages.kto.epochs=4", "stages.kto.heldout_fraction=0.25")


@pytest.mark.parametrize("format", FILES)
def test_kto_learns_from_a_file_of_labels_or_of_pairs(finished, tmp_path, format):
    summary, _ = run_stage("kto", finished, tmp_path, *from_file(tmp_path, FILES[format]))
    assert (summary["rows"], summary["heldout_rows"], summary["desirable"]) == {
        "kto": (27, 9, pytest.approx(0.5, abs=0.15)),
        "preference": (30, 10, 0.5),
    }[format]
    assert summary["heldout_accuracy"] > 0.75
    assert summary.get("heldout_pair_accuracy") == {"kto": None, "preference": 1.0}[format]
    assert summary["heldout_chosen_reward"] > summary["heldout_rejected_reward"] + 0.2


def test_a_file_that_kto_cannot_use_is_an_error_for_people(finished, tmp_path):
    bad = [*FILES["kto"][:3], {"prompt": "x", "completion": "y"}]
    with pytest.raises(DataError, match=r"rows.jsonl:4: column 'label' missing"):
        run_stage("kto", finished, tmp_path / "a", *from_file(tmp_path, bad))
    with pytest.raises(RecipeError, match="format 'prompts' does not hold labelled answers"):
        run_stage("kto", finished, tmp_path / "b", *from_file(tmp_path, FILES["kto"], format="prompts"))
    same = [{"prompt": "x", "completion": text, "label": good} for text, good in LIKED]
    with pytest.raises(DataError, match="all rows have the same prompt"):
        run_stage("kto", finished, tmp_path / "c", *from_file(tmp_path, same))


def test_ktos_reference_point_rises_with_the_policy_and_not_with_the_passes(finished, tmp_path):
    """Desirable answers alone raise their own probability after any prompt; a batch is one pass, or many."""
    desirable = [line for line in FILES["kto"] if line["label"]]
    summaries, steps = [], []
    for limit in (4096, 60):
        folder = tmp_path / str(limit)
        folder.mkdir()
        overrides = (*from_file(folder, desirable), f"stages.kto.max_tokens_per_microbatch={limit}")
        summaries.append(run_stage("kto", finished, folder, *overrides)[0])
        steps.append(rows(folder, "kto"))
    points = [row["kl"] for row in steps[0]]
    assert points[0] == pytest.approx(0, abs=1e-4)
    assert min(points[1:]) > 0.1
    for name in ("kl", "loss", "grad_norm", "chosen_reward"):
        assert [row[name] for row in steps[1]] == pytest.approx([row[name] for row in steps[0]], rel=1e-3, abs=1e-4)
    assert summaries[1]["heldout_kl"] == pytest.approx(summaries[0]["heldout_kl"], rel=1e-3)
    assert summaries[0]["heldout_kl"] > 1
