"""Settings of the online methods that exclude each other."""

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.stage_schema import upstream


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "target_kl: 5\n    kl_coef: 0",
            "24:16: stages.ppo.target_kl: an adaptive kl_coef scales from where it starts",
        ),
        ("samples_per_prompt: 1\n    redraws: 2", "stages.ppo.redraws: dynamic sampling compares a prompt's samples"),
        (
            "max_response_tokens: 8\n    overlong: {buffer: 9}",
            "stages.ppo.overlong.buffer: must be at most max_response_tokens = 8",
        ),
        ("samples_per_prompt: 2\n    redraws: 2\n    staleness: 1", "stages.ppo.staleness: dynamic sampling (redraws)"),
        ("staleness: 2", "stages.ppo.staleness: must be less than or equal to 1, got 2"),
        ("staleness: -1", "stages.ppo.staleness: must be greater than or equal to 0, got -1"),
    ],
)
def test_refused(folder, text, extra, expected):
    text = text.replace("    samples_per_prompt: 2\n    minibatch_size: 6\n", f"    minibatch_size: 6\n    {extra}\n")
    with pytest.raises(RecipeError) as error:
        folder.load(text)
    assert expected in str(error.value)


def test_the_baseline_of_reinforce_is_no_stage(folder, text):
    text = text.replace("kind: ppo", "kind: reinforce_pp\n    baseline: group")
    stage = folder.load(text).recipe.stages[3]
    assert (stage.baseline, upstream(stage)) == ("group", {"sft", "rm"})


def test_an_engine_on_the_policy_s_devices_cannot_generate_while_it_learns(folder, text):
    text = text.replace("    minibatch_size: 6\n", "    minibatch_size: 6\n    staleness: 1\n")
    assert folder.load(text).recipe.stages[3].staleness == 1
    with pytest.raises(RecipeError, match=r"stages\.ppo\.staleness: cannot generate while it learns"):
        folder.load(text, "roles.rollout.share=policy")


def test_online_dpo_has_no_importance_weight_and_so_no_staleness(folder, text):
    with pytest.raises(RecipeError, match=r"stages\.ppo\.staleness: unknown key"):
        folder.load(text.replace("kind: ppo", "kind: online_dpo\n    staleness: 1"))
