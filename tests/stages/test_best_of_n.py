"""Best-of-n: the best sample of each prompt is written, trained on as it was sampled, and the policy gets better."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.data.best import read_best
from rlhf.data.pairs import read_pairs
from rlhf.data.reading import read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.engines.base import RolloutSpec
from rlhf.engines.hf_generate import TransformersEngine
from rlhf.local import LocalLauncher
from rlhf.models.loading import resolve_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.base import PathData
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.schema import ModelSource
from rlhf.recipe_run import run_recipe
from rlhf.types import Sampling

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe without its comparison, whose figures are made here by hand."""
    made = tmp_path_factory.mktemp("run")
    changes = ("stages.samples.label_noise=0.5", "stages.best.heldout_fraction=0")
    loaded = load_recipe(RECIPES / "smoke" / "best_of_n.yaml", changes)
    trained = loaded.recipe.model_copy(update={"stages": loaded.recipe.stages[:2]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        run_recipe(replace(loaded, recipe=trained), LocalLauncher, made, Console(record=True, width=200))
    return made / "stages"


def gold(text: str) -> float:
    spec = importlib.util.spec_from_file_location("smoke_rewards", RECIPES / "rewards" / "smoke.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gold("", text, {})


def mean_gold(model: Path) -> float:
    """Return the mean reward of 8 samples of each held-out prompt."""
    prompts = tokenize_prompts(
        read_prompts(PathData(path=RECIPES / "data" / "smoke_heldout.jsonl")), load_tokenizer(model), 64
    )
    spec = RolloutSpec(model, "float32", RolloutRole(engine="transformers"), 128, threads=1, seed=0)
    rollouts = TransformersEngine(spec).generate(prompts, Sampling(12), [list(range(8))] * len(prompts))
    return sum(gold(rollout.text) for rollout in rollouts) / len(rollouts)


def test_the_best_is_the_highest_noise_free_score_of_its_prompt(folder):
    best = {row.prompt_id: row for row in read_best(folder / "samples" / "best.jsonl")}
    pairs = [pair for pair in read_pairs(folder / "samples" / "pairs.jsonl") if not pair.heldout]
    assert any(pair.flipped for pair in pairs)
    for pair in pairs:
        row = best[pair.prompt_id]
        better = pair.rejected if pair.flipped else pair.chosen
        assert (row.response, row.score) == (better, max(pair.chosen_score, pair.rejected_score))
        assert row.prompt_tokens == pair.prompt_tokens
        assert row.score == pytest.approx(gold(row.response), abs=1e-6)


def test_prompts_held_out_are_left_out(folder):
    best = [row.prompt_id for row in read_best(folder / "samples" / "best.jsonl")]
    heldout = {pair.prompt_id for pair in read_pairs(folder / "samples" / "pairs.jsonl") if pair.heldout}
    assert heldout
    assert not heldout & set(best)
    assert len(best) == len(set(best)) == 32 - len(heldout)


def test_sft_trains_on_the_sampled_tokens_themselves(folder):
    """Every token of prompt and response goes through once an epoch, none is added or lost by tokenising again."""
    best = read_best(folder / "samples" / "best.jsonl")
    rows = (folder / "best" / "metrics.jsonl").read_text().splitlines()
    tokens = sum(len(row.prompt_tokens) + len(row.response_tokens) for row in best)
    assert json.loads(rows[-1])["gradient_tokens"] == 12 * tokens
    assert json.loads((folder / "best" / "done.json").read_text())["summary"] == {
        "rows": len(best),
        "heldout_rows": 0,
        "kept_step": len(rows),
    }


def test_imitating_the_best_improves_the_reward(folder):
    base = resolve_model(ModelSource(path="tiny://llama"))
    before, after = mean_gold(base), mean_gold(folder / "best" / "model")
    assert after > 1.8 * before, (before, after)
