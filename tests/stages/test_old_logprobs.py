"""The engine's logprobs as those of the policy before the step: what is left out, and what is checked all the same."""

import json
from dataclasses import replace

import pytest
from online_made import scored_of, stage_of
from overlap_made import training_of
from test_online_methods import RECIPES, rows, run

from rlhf.errors import GuardError, RecipeError
from rlhf.local import LocalModel
from rlhf.recipe.load import load_recipe
from rlhf.recipe.online_schema import Agreement
from rlhf.stages.experience import measure
from rlhf.stages.old_logprobs import settled
from rlhf.stages.online import in_turn

BY_TRAINER = ["agreement", "agreement_max"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """GRPO in float32 with both kinds, in several minibatches and epochs: its metrics, and the passes of the policy."""
    found = {}
    for kind in ("recompute", "rollout"):
        passes, plain = [], LocalModel.logprobs

        def logprobs(self, batch, passes=passes, plain=plain):
            passes.extend([len(batch)] if self.learner.spec.role == "policy" else [])
            return plain(self, batch)

        folder = tmp_path_factory.mktemp(kind)
        settings = {"staleness": 0, "steps": 5, "prompts_per_step": 4, "epochs": 2, "optimizer.learning_rate": "1.0e-3"}
        settings |= {"agreement.interval": 2, "old_logprobs": kind}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalModel, "logprobs", logprobs)
            run(folder, "overlap.yaml", *(f"stages.grpo.{name}={value}" for name, value in settings.items()))
        found[kind] = (rows(folder, "grpo"), len(passes))
    return found


def test_the_policy_is_asked_at_the_checks_alone(runs):
    assert {kind: passes for kind, (_, passes) in runs.items()} == {"recompute": 5, "rollout": 3}


def test_what_only_the_trainer_can_say_is_missing_in_between_and_not_zero(runs):
    by_engine, by_trainer = runs["rollout"][0], runs["recompute"][0]
    for name in BY_TRAINER:
        assert [step for step, row in enumerate(by_engine) if name in row] == [0, 2, 4]
        assert all(name in row for row in by_trainer)
    assert all(set(trained) - set(row) <= set(BY_TRAINER) for row, trained in zip(by_engine, by_trainer, strict=True))
    assert all(row["agreement"] < 1e-5 for row in by_engine[::2])


def test_the_entropy_is_estimated_from_the_samples_in_between():
    """Rows of 1, 2, 3, 1, 2, 3 tokens, each at logprob -1: 1 nat a token."""
    asked = scored_of([1, 2, 3, 4, 4, 4])
    left_out = replace(asked, old=None)
    assert measure(left_out, compares_samples=False)["entropy"] == pytest.approx(1)
    assert "agreement" not in measure(left_out, compares_samples=False)


def test_in_float32_the_same_is_learnt(runs):
    for row, trained in zip(runs["rollout"][0], runs["recompute"][0], strict=True):
        for name in ("reward", "kl", "length", "policy_loss", "ratio", "grad_norm"):
            assert row[name] == pytest.approx(trained[name], rel=1e-2, abs=2e-3), name
        assert row["importance_weight"] == pytest.approx(1, abs=1e-4)
    assert [row["importance_weight"] for row in runs["rollout"][0][1::2]] == [1, 1]


def test_the_gate_stops_the_run_at_its_next_check(tmp_path):
    """The engine drifts while step 1 is learnt; checks are at steps 0, 3, 6."""

    def during(what, number):
        training.roles.policy.gap = 0.25 if (what, number) == ("learn", 1) else training.roles.policy.gap

    stage = stage_of("grpo", steps=9, old_logprobs="rollout", agreement=Agreement(interval=3))
    training = training_of(stage, tmp_path, during)
    with pytest.raises(GuardError, match=r"differ by 0\.250 nats"):
        in_turn(training)
    assert training.roles.policy.done["learn"] == 3
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["agreement" in row for row in steps] == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["agreement.interval=1"], "recompute where agreement.interval is 1 (the trainer's pass is left out between"),
        (["agreement.interval=9", "staleness=1"], "recompute where staleness is above 0 (the engine's logprobs are"),
    ],
)
def test_refused(settings, expected):
    overrides = ["stages.grpo.old_logprobs=rollout", "stages.grpo.staleness=0"]
    overrides += [f"stages.grpo.{setting}" for setting in settings]
    with pytest.raises(RecipeError) as error:
        load_recipe(RECIPES / "smoke" / "overlap.yaml", tuple(overrides))
    assert f"stages.grpo.old_logprobs: must be {expected}" in str(error.value)
    assert str(error.value).endswith("got 'rollout'")


@pytest.mark.parametrize(
    ("settings", "dtype", "expected"),
    [
        ({}, "float32", ("rollout", 10)),
        ({}, "bfloat16", ("recompute", 1)),
        ({"staleness": 1}, "float32", ("recompute", 1)),
        ({"agreement": Agreement(interval=3)}, "float32", ("rollout", 3)),
        ({"agreement": Agreement(interval=1)}, "float32", ("recompute", 1)),
        ({"agreement": Agreement(interval=3)}, "bfloat16", ("recompute", 3)),
        ({"old_logprobs": "recompute"}, "float32", ("recompute", 1)),
        ({"old_logprobs": "rollout"}, "bfloat16", ("rollout", 10)),
    ],
)
def test_auto_takes_the_engine_s_logprobs_where_they_are_the_trainer_s(settings, dtype, expected):
    stage = settled(stage_of("ppo", **settings), dtype)
    assert (stage.old_logprobs, stage.agreement.every) == expected


def test_methods_without_the_key_keep_a_check_at_every_step():
    stage = stage_of("online_dpo")
    assert settled(stage, "float32") is stage
    assert stage.agreement.every == 1


def test_a_run_settles_it_by_its_dtype(tmp_path):
    """The default in float32: the policy is asked at step 0 alone, and the gate is due there and at step 10."""
    settings = {"staleness": 0, "steps": 2, "prompts_per_step": 2, "epochs": 1, "agreement.interval": "auto"}
    run(tmp_path, "overlap.yaml", *(f"stages.grpo.{name}={value}" for name, value in settings.items()))
    assert ["agreement" in row for row in rows(tmp_path, "grpo")] == [True, False]
    assert all("entropy" in row for row in rows(tmp_path, "grpo"))


def test_a_step_of_one_update_learns_the_same_without_the_pass(tmp_path_factory):
    settings = {"staleness": 0, "steps": 4, "prompts_per_step": 2, "epochs": 1, "minibatch_size": 16}
    found = {}
    for kind in ("recompute", "rollout"):
        folder = tmp_path_factory.mktemp(f"single-{kind}")
        chosen = settings | {"agreement.interval": 4, "old_logprobs": kind}
        run(folder, "overlap.yaml", *(f"stages.grpo.{name}={value}" for name, value in chosen.items()))
        found[kind] = rows(folder, "grpo")
    for row, trained in zip(found["rollout"], found["recompute"], strict=True):
        assert row["ratio"] == trained["ratio"] == 1
        for name in ("reward", "policy_loss", "grad_norm", "importance_weight"):
            assert row[name] == pytest.approx(trained[name], rel=1e-4, abs=1e-5), name
