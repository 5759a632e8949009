"""What two recipes do differently, and what does not count."""

from pathlib import Path

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


def clone(root, file="data/chats.jsonl", model="models/base"):
    """The recipe of a folder, resolved there."""
    sft = {
        "name": "sft",
        "kind": "sft",
        "data": {"path": f"{root}/{file}"},
        "judges": [{"kind": "function", "path": f"{root}/judge.py:score"}],
    }
    return {"name": "one", "model": {"path": f"{root}/{model}"}, "stages": [sft]}


def test_two_clones_of_one_recipe_are_equal():
    recipes, folders = [clone("/home/a/q"), clone("/work/q-2")], [Path("/home/a/q"), Path("/work/q-2")]
    assert recipe_differences(recipes, folders) == []
    assert len(recipe_differences(recipes)) == 3  # whose folders are not known


def test_other_files_are_differences_wherever_they_are():
    folders = [Path("/a"), Path("/b")]
    assert recipe_differences([clone("/a", "data/v1/x.jsonl"), clone("/b", "data/v2/x.jsonl")], folders) == [
        RecipeDifference("stages.sft.data.path", ("data/v1/x.jsonl", "data/v2/x.jsonl"))
    ]
    assert recipe_differences([clone("/a"), clone("/b", "../c/x.jsonl")], folders) == [
        RecipeDifference("stages.sft.data.path", ("data/chats.jsonl", "/b/../c/x.jsonl"))
    ]


def test_one_file_that_both_name_is_none():
    shared = [{"name": "n", "stages": [], "model": {"path": "/models/base"}}] * 2
    assert recipe_differences(shared, [Path("/a"), Path("/deep/down/b")]) == []
    hub = [{"name": "n", "stages": [], "model": {"path": path}} for path in ("org/base", "/b/org/base")]
    assert recipe_differences(hub, [Path("/a"), Path("/b")]) == []
