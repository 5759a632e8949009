"""What two recipes do differently, and what does not count."""

from rlhf.report.recipes import RecipeDifference, recipe_differences


def recipe(**changes):
    ppo = {"name": "ppo", "kind": "ppo", "kl_coef": 0.02, "optimizer": {"learning_rate": 1e-5}, "save_every": None}
    return {"name": "one", "seed": 17, "tuning": {"r": 16}, "roles": {"policy": {"gpus": 0}}, "stages": [ppo]} | changes


def test_the_same_recipe_elsewhere_differs_in_nothing():
    other = recipe(name="two", output_dir="x", backend="local", roles={"policy": {"gpus": 1}}, tracking={"wandb": 1})
    other["stages"] = [other["stages"][0] | {"max_tokens_per_microbatch": 1, "save_every": 5}]
    assert recipe_differences([recipe(), other]) == []
    assert recipe_differences([recipe()]) == []
    assert recipe_differences([]) == []


def test_changed_keys_are_named_with_their_values_in_order():
    stage = {"name": "ppo", "kind": "ppo", "kl_coef": 0.1, "optimizer": {"learning_rate": 1e-4}, "clip_range": 0.2}
    found = recipe_differences([recipe(), recipe(tuning="full", stages=[stage]), recipe()])
    assert found == [
        RecipeDifference("tuning.r", ("16", "-", "16")),
        RecipeDifference("stages.ppo.kl_coef", ("0.02", "0.1", "0.02")),
        RecipeDifference("stages.ppo.optimizer.learning_rate", ("1e-05", "0.0001", "1e-05")),
        RecipeDifference("tuning", ("-", "full", "-")),
        RecipeDifference("stages.ppo.clip_range", ("-", "0.2", "-")),
    ]


def test_a_stage_that_one_does_not_have_is_one_row():
    dpo = {"name": "dpo", "kind": "dpo", "beta": 0.1, "data": {"stage": "pairs"}}
    found = recipe_differences([recipe(), recipe(stages=[*recipe()["stages"], dpo])])
    assert found == [RecipeDifference("stages.dpo", ("-", "dpo"))]
    other_kind = recipe(stages=[recipe()["stages"][0] | {"kind": "grpo"}])
    assert recipe_differences([recipe(), other_kind]) == [RecipeDifference("stages.ppo", ("ppo", "grpo"))]


def files(folder, train="data/train.jsonl"):
    sft = {"name": "sft", "kind": "sft", "data": {"path": f"{folder}/{train}"}}
    pairs = {"name": "pairs", "kind": "annotate", "judge": {"path": f"{folder}/rewards.py:score"}}
    return recipe(stages=[sft, pairs])


def test_copies_of_a_project_in_other_folders_are_alike():
    assert recipe_differences([files("/home/ann/project"), files("/scratch/bob/copy")]) == []


def test_another_file_of_a_project_is_a_difference():
    found = recipe_differences([files("/home/ann"), files("/home/bob", "data/v2/train.jsonl")])
    assert found == [RecipeDifference("stages.sft.data.path", ("data/train.jsonl", "data/v2/train.jsonl"))]
