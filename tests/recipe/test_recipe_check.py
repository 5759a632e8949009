"""References between stages, and settings that exclude each other."""

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.check import check_references

LATER = "a stage can only use earlier ones"
NEEDS = "but a language model is needed here (there are base, sft"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "policy: sft\n    reward",
            "policy: stf\n    reward",
            "18:13: stages.ppo.policy: no stage is named 'stf' (did you mean sft?)",
        ),
        (
            "policy: sft\n    reward",
            "policy: dpo\n    reward",
            f"18:13: stages.ppo.policy: stage 'dpo' comes later; {LATER}",
        ),
        (
            "policy: sft\n    reward",
            "policy: ppo\n    reward",
            f"18:13: stages.ppo.policy: stage 'ppo' comes later; {LATER}",
        ),
        (
            "policy: sft\n    reward",
            "policy: pairs\n    reward",
            f"18:13: stages.ppo.policy: 'pairs' is a stage of kind annotate, {NEEDS})",
        ),
        ("init: sft", "init: pairs", f"14:11: stages.rm.init: 'pairs' is a stage of kind annotate, {NEEDS})"),
        (
            "data: {stage: pairs}\n  - name: ppo",
            "data: {stage: sft}\n  - name: ppo",
            "15:19: stages.rm.data.stage: 'sft' is a stage of kind sft, "
            "but a stage of kind annotate is needed here (there are pairs)",
        ),
        (
            "data: {stage: pairs}\n  - name: duel",
            "data: {stage: base}\n  - name: duel",
            "28:19: stages.dpo.data.stage: 'base' is the base model, "
            "but a stage of kind annotate is needed here (there are pairs)",
        ),
        (
            "reward: {kind: model, stage: rm}\n    prompts",
            "reward: {kind: model, stage: sft}\n    prompts",
            "19:34: stages.ppo.reward.stage: 'sft' is a stage of kind sft, "
            "but a stage of kind reward is needed here (there are rm)",
        ),
        (
            "[sft, ppo, dpo]",
            "[sft, rm, dpo]",
            f"31:23: stages.duel.candidates[1]: 'rm' is a stage of kind reward, {NEEDS}, ppo, dpo)",
        ),
        ("[sft, ppo, dpo]", "[sft, ppo, sft]", "31:28: stages.duel.candidates[2]: 'sft' is there twice"),
        ("baseline: sft", "baseline: base", "32:15: stages.duel.baseline: 'base' is not among the candidates"),
        ("name: dpo", "name: ppo", "25:11: stages.ppo.name: two stages are named 'ppo'"),
        ("name: dpo", "name: base", "25:11: stages.base.name: 'base' is reserved for the model the recipe starts from"),
        (
            "minibatch_size: 6",
            "minibatch_size: 17",
            "24:21: stages.ppo.minibatch_size: must be at most prompts_per_step * samples_per_prompt = 16, got 17",
        ),
        (
            "stages:\n",
            "roles: {policy: {gpus: 1.5}}\nstages:\n",
            "3:24: roles.policy.gpus: must be whole above 1, got 1.5",
        ),
        (
            "stages:\n",
            "roles: {rollout: {gpus: 1, tensor_parallel: 2}}\nstages:\n",
            "3:25: roles.rollout.gpus: tensor_parallel: 2 needs gpus: 2 for each replica, got 1",
        ),
        (
            "stages:\n",
            "roles: {policy: {gpus: 2}}\nstages:\n",
            "3:24: roles.policy.gpus: a rank computes on one GPU, got 2; use ranks: 2 with gpus: 1",
        ),
        (
            "stages:\n",
            "roles: {policy: {offload: parameters}}\nstages:\n",
            "3:27: roles.policy.offload: parameters leave the device with zero_stage: 3 only",
        ),
        (
            "dtype: float32}\n",
            "dtype: bfloat16}\nroles: {critic: {ranks: 2, zero_stage: 0}}\n",
            "3:40: roles.critic.zero_stage: ZeRO stage 0 cannot train bfloat16 weights: "
            "use 1, 2 or 3, or model.dtype: float32",
        ),
        (
            "stages:\n",
            "roles: {critic: {share: policy, gpus: 1}}\nstages:\n",
            "3:39: roles.critic.gpus: the role shares the devices of policy, so it has none of its own; leave gpus out",
        ),
        (
            "stages:\n",
            "roles: {critic: {share: reward}, reward: {share: policy}}\nstages:\n",
            "3:25: roles.critic.share: reward shares the devices of policy itself; name that one",
        ),
        (
            "stages:\n",
            "roles: {critic: {share: policy, ranks: 2}}\nstages:\n",
            "3:40: roles.critic.ranks: must be at most the 1 of policy, whose devices it shares, got 2",
        ),
        (
            "stages:\n",
            "roles: {policy: {ranks: 4}, rollout: {share: policy, replicas: 3, tensor_parallel: 2}}\nstages:\n",
            "3:46: roles.rollout.share: 3 replicas of tensor_parallel 2 do not fit the 4 ranks of policy; "
            "there is room for replicas: 2 with tensor_parallel: 2",
        ),
        (
            "stages:\n",
            "tuning: {kind: full}\nroles: {rollout: {weights: adapter}}\nstages:\n",
            "4:28: roles.rollout.weights: stage 'ppo' trains weights of the model itself, "
            "so there is no adapter to send; use weights: merged",
        ),
    ],
)
def test_findings_have_positions(folder, text, old, new, expected):
    assert old in text
    with pytest.raises(RecipeError) as caught:
        folder.load(text.replace(old, new, 1))
    assert f"recipe.yaml:{expected}" in str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("policy: sft\n    reward", "policy: base\n    reward"),
        ("[sft, ppo, dpo]", "[base, sft, dpo]"),
        ("minibatch_size: 6", "minibatch_size: 16"),
        ("stages:\n", "roles: {policy: {gpus: 0.5}, rollout: {gpus: 2, tensor_parallel: 2}}\nstages:\n"),
        ("stages:\n", "roles: {reference: {share: policy}}\nstages:\n"),
    ],
)
def test_what_fits(folder, text, old, new):
    assert old in text
    assert check_references(folder.load(text.replace(old, new, 1)).recipe) == []
