"""Which roles a stage starts, the threads they get, and recipes that do not fit."""

import os

import pytest

from rlhf.errors import ResourceError
from rlhf.recipe import schedule
from rlhf.recipe.resources import Resources, Wanted, check_fits, local_resources, processes, threads, wanted

SHARE = "roles: {reference: {share: policy}}\n"
GPUS = """\
roles:
  policy: {gpus: 1}
  reference: {gpus: 0.5}
  reward: {gpus: 0.5, cpus: 2}
  critic: {gpus: 1}
  rollout: {gpus: 2, tensor_parallel: 2, replicas: 3, cpus: 0.5}
"""


def by_stage(recipe, measure):
    return {stage.name: measure(stage) for stage in recipe.stages}


def test_roles_of_each_kind(folder, text):
    recipe = folder.load(text).recipe
    assert by_stage(recipe, lambda stage: list(wanted(recipe, stage))) == {
        "sft": ["policy"],
        "pairs": ["rollout"],
        "rm": ["reward"],
        "ppo": ["policy", "reference", "reward", "critic", "rollout"],
        "dpo": ["policy"],
        "duel": ["policy", "reward", "rollout"],
    }


def test_a_shared_reference_and_a_function_start_no_process(folder, text):
    function = "{kind: function, path: 'rewards.py:score'}"
    recipe = folder.load(SHARE + text.replace("{kind: model, stage: rm}", function)).recipe
    assert list(wanted(recipe, recipe.stages[3])) == ["policy", "critic", "rollout"]
    assert list(wanted(recipe, recipe.stages[5])) == ["policy", "rollout"]


def test_a_model_as_judge_of_an_annotation(folder, text):
    second = "  - {name: more, kind: annotate, policy: ppo, judge: {kind: model, stage: rm}, prompts: {hub: a/b}}\n"
    recipe = folder.load(text + second).recipe
    assert list(wanted(recipe, recipe.stages[-1])) == ["reward", "rollout"]


def test_amounts(folder, text):
    recipe = folder.load(GPUS + text).recipe
    assert wanted(recipe, recipe.stages[3]) == {
        "policy": Wanted(1, 1, 1),
        "reference": Wanted(0.5, 1, 1),
        "reward": Wanted(0.5, 2, 1),
        "critic": Wanted(1, 1, 1),
        "rollout": Wanted(2, 0.5, 3),
    }
    assert processes(recipe) == wanted(recipe, recipe.stages[3])


def test_threads_never_oversubscribe_what_runs_together(folder, text):
    recipe = folder.load(text).recipe
    assert by_stage(recipe, lambda stage: threads(recipe, stage, 8)) == {
        "sft": {"policy": 8},
        "pairs": {"rollout": 8},
        "rm": {"reward": 8},
        "ppo": {"policy": 4, "reference": 4, "reward": 4, "critic": 4, "rollout": 8},
        "dpo": {"policy": 8},
        "duel": {"policy": 8, "reward": 8, "rollout": 8},
    }
    assert set(threads(recipe, recipe.stages[3], 1).values()) == {1}


def test_gpus_of_the_whole_run_must_be_there(folder, text):
    recipe = folder.load(GPUS + text).recipe
    check_fits(recipe, Resources(cpus=1, gpus=9, memory_bytes=0))
    with pytest.raises(ResourceError) as caught:
        check_fits(recipe, Resources(cpus=64, gpus=8, memory_bytes=0))
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        "the recipe wants 9 gpus: policy 1 (for sft, ppo, dpo, duel), reference 0.5 (for ppo), "
        "reward 0.5 (for rm, ppo, duel), critic 1 (for ppo), rollout 6 (for pairs, ppo, duel); 8 available. "
        "Lower roles.*.gpus, share roles, or use a larger machine or cluster"
    )


def test_roles_that_no_stage_uses_do_not_count(folder, text):
    only_sft = text[: text.index("  - name: pairs")]
    check_fits(folder.load(GPUS + only_sft).recipe, Resources(1, 1, 0))
    with pytest.raises(ResourceError):
        check_fits(folder.load(GPUS + text).recipe, Resources(1, 1, 0))


def test_cpus_count_on_a_cluster_only(folder, text):
    few = Resources(cpus=6, gpus=9, memory_bytes=0)
    check_fits(folder.load(GPUS + text).recipe, few)
    cluster = folder.load(GPUS + "ray: {address: auto}\n" + text).recipe
    with pytest.raises(ResourceError, match=r"^the recipe wants 6\.5 cpus: .*; 6 available"):
        check_fits(cluster, few)


def test_roles_of_one_process_take_turns(folder, text):
    recipe = folder.load(GPUS + "backend: local\n" + text).recipe
    check_fits(recipe, Resources(1, 6, 0))
    with pytest.raises(ResourceError, match="wants 6 gpus"):
        check_fits(recipe, Resources(1, 5, 0))


def test_local_resources_are_those_of_this_process():
    found = local_resources()
    assert found.cpus == len(os.sched_getaffinity(0))
    assert found.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("roles", "backend", "gpus", "tokens"),
    [
        ("", "ray", 0, 1024),
        ("", "ray", 8, 1024),  # no role asks for one
        (GPUS, "ray", 0, 4096),  # planned on a machine without
        ("", "local", 0, 1024),
        ("", "local", 1, 4096),  # in one process every role is where that process computes
    ],
)
def test_passes_are_as_large_as_suits_the_device(folder, text, monkeypatch, roles, backend, gpus, tokens):
    monkeypatch.setattr(schedule, "visible_gpus", lambda: gpus)
    recipe = folder.load(roles + text).recipe.model_copy(update={"backend": backend})
    assert {schedule.pass_tokens(recipe, stage) for stage in recipe.stages if stage.kind in ("sft", "ppo")} == {tokens}
