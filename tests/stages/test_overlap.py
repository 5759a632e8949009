"""One step off-policy: what overlaps, what the rollouts are worth, and what it costs."""

import json
import math
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from online_made import Pupil, context_of, scored_of, stage_of
from overlap_made import training_of
from test_online_methods import rows, run
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf.engines.scoring import response_logprobs
from rlhf.errors import GuardError
from rlhf.local import LocalModel
from rlhf.recipe.base import Budget
from rlhf.recipe.online_schema import Agreement
from rlhf.stages import online
from rlhf.stages.online import in_turn
from rlhf.stages.overlap import PROBE_TOKENS, PROBES, overlapped
from rlhf.stages.policy_gradient import PolicyGradient, objective, start_estimator

CLOCKS = {"time", "tokens_per_second", "seconds_generate", "seconds_score", "seconds_learn", "seconds_publish"}
CAP = 1.2


def timeless(folder, stage):
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows(folder, stage)]


def samples(folder, stage):
    return [path.read_bytes() for path in sorted((folder / "stages" / stage / "samples").iterdir())]


def weights(folder, stage):
    return (folder / "stages" / stage / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("recipe", "stage", "settings"),
    [
        ("overlap.yaml", "grpo", ["staleness=0", "steps=4"]),
        ("overlap.yaml", "grpo", ["staleness=0", "steps=3", "redraws=2"]),
        ("ppo_function.yaml", "ppo", ["steps=3", "kl_coef=0.1"]),
    ],
)
def test_at_staleness_0_both_loops_give_the_same_bits(tmp_path, monkeypatch, recipe, stage, settings):
    settings = [f"stages.{stage}.{setting}" for setting in settings]
    run(tmp_path / "in_turn", recipe, *settings)
    monkeypatch.setattr(online, "in_turn", overlapped)
    run(tmp_path / "overlapped", recipe, *settings)
    for found in (weights, samples, timeless):
        assert found(tmp_path / "overlapped", stage) == found(tmp_path / "in_turn", stage)


def test_while_the_weights_stand_still_staleness_changes_nothing(tmp_path):
    """Prompts and seeds are those of the step, whenever it is drawn."""
    still = ["stages.grpo.steps=4", "stages.grpo.optimizer.learning_rate=1.0e-30", "stages.grpo.save_every=4"]
    still += ["stages.grpo.old_logprobs=recompute"]  # as staleness has it
    run(tmp_path / "fresh", "overlap.yaml", "stages.grpo.staleness=0", *still)
    run(tmp_path / "stale", "overlap.yaml", *still)
    assert samples(tmp_path / "stale", "grpo") == samples(tmp_path / "fresh", "grpo")
    assert weights(tmp_path / "stale", "grpo") == weights(tmp_path / "fresh", "grpo")
    assert (tmp_path / "stale" / "stages" / "grpo" / "checkpoints" / "step-4" / "model.safetensors").exists()
    for stale, fresh in zip(timeless(tmp_path / "stale", "grpo"), timeless(tmp_path / "fresh", "grpo"), strict=True):
        assert stale.pop("generated_tokens") >= fresh.pop("generated_tokens")
        assert stale["kl"] == pytest.approx(fresh.pop("kl"), abs=1e-3)
        assert fresh.items() <= stale.items()
        assert set(stale) - set(fresh) <= {"kl", "staleness", "probe_agreement"}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The smoke recipe, with all checkpoints, and what the policy was given to learn at each step."""
    folder, lessons = tmp_path_factory.mktemp("overlap"), []

    def train(self, batch, *arguments):
        lessons.append(batch)
        return plain(self, batch, *arguments)

    plain = LocalModel.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalModel, "train", train)
        run(folder, "overlap.yaml", "stages.grpo.save_every=1", f"stages.grpo.importance_cap={CAP}")
    return folder, lessons


def test_the_smoke_recipe_improves_its_reward(learnt):
    steps = rows(learnt[0], "grpo")
    rewards = [row["reward"] for row in steps]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.4
    assert [row["staleness"] for row in steps] == [0] + [1] * 11
    assert all(row["skipped_steps"] == 0 for row in steps)


def test_engine_and_trainer_are_compared_at_equal_weights(learnt):
    """The rollouts themselves are one step old, so what they differ by is no fault."""
    first, *later = rows(learnt[0], "grpo")
    assert first["agreement"] < 1e-5
    assert "probe_agreement" not in first
    assert all(row["probe_agreement"] < 1e-5 < 0.1 < row["agreement"] for row in later)
    for before, row in pairwise(rows(learnt[0], "grpo")):
        probed = row["generated_tokens"] - before["generated_tokens"] - 64 * row["length"]
        assert PROBES <= round(probed) <= PROBES * PROBE_TOKENS


def test_the_weight_is_the_policy_s_probability_over_the_older_one_that_sampled(learnt):
    """An oracle from the saved checkpoints: step k learns from samples of version k - 1."""
    folder, lessons = learnt
    steps, saved = rows(folder, "grpo"), folder / "stages" / "grpo" / "checkpoints"
    for k in (2, 5, 11):
        batch = lessons[k].batch
        old, behaviour = (
            response_logprobs(AutoModelForCausalLM.from_pretrained(saved / f"step-{version}"), batch, 1.0).detach()
            for version in (k, k - 1)
        )
        torch.testing.assert_close(batch.rollout_logprobs, behaviour, rtol=0, atol=2e-5)
        torch.testing.assert_close(lessons[k].old_logprobs, old, rtol=0, atol=2e-5)
        ratio = (old - behaviour)[batch.response_mask].exp()
        assert 0.5 > (ratio > CAP).float().mean() > 0.02  # so that the cap matters
        assert steps[k]["importance_weight"] == pytest.approx(float(ratio.clamp(max=CAP).mean()), abs=1e-4)
        kl = (behaviour - lessons[k].ref_logprobs)[batch.response_mask].sum() / 64
        assert steps[k]["kl"] == pytest.approx(float(kl), abs=1e-2)


class Fixed(nn.Module):
    """Gives the response tokens these logprobs, whatever came before."""

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = nn.Parameter(logprobs)


def test_the_loss_of_stale_rollouts_by_hand(tmp_path, monkeypatch):
    """One response of two tokens: b = (0.1, 0.5), p = (0.2, 0.1), so weights 2 -> cap 1.5 and 0.2; q = 1.1 p.

    Advantage 1 and -1 for two equal responses; q / p = 1.1 is within the clip, q / b = 2.2 would not be.
    """
    mask = torch.tensor([[False, True, True]]).expand(2, 3)
    old = torch.tensor([[0, math.log(0.2), math.log(0.1)]]).expand(2, 3)
    sampled = torch.tensor([[0, math.log(0.1), math.log(0.5)]]).expand(2, 3)
    scored = scored_of([1.0, 0.0], per_prompt=2)
    scored = replace(
        scored,
        batch=replace(scored.batch, **dict(zip(
            ("tokens", "attention_mask", "response_mask", "rollout_logprobs"),
            (torch.full((2, 3), 7), torch.ones(2, 3, dtype=torch.bool), mask, sampled), strict=True))),
        old=replace(scored.old, logprobs=old),
        ref_logprobs=old,
        stale=True,
    )  # fmt: skip
    settings = {"prompts_per_step": 1, "samples_per_prompt": 2, "minibatch_size": 2, "importance_cap": 1.5}
    stage, policy = stage_of("dr_grpo", staleness=1, aggregation="token", **settings), Pupil()
    context = context_of(stage, tmp_path)
    PolicyGradient(stage, context, policy, start_estimator(stage, context)).learn(scored, 1, 10)
    experience = policy.lessons[0][0]
    assert experience.advantages[:, 1].tolist() == [0.5, -0.5]
    model = Fixed(old + math.log(1.1))
    monkeypatch.setattr("rlhf.engines.policy_objectives.response_logprobs", lambda model, *_: model.logprobs)
    loss, metrics = objective(stage, 0.0).loss(model, experience)
    assert metrics["importance_weight"] == pytest.approx((1.5 + 0.2) / 2)
    assert (metrics["ratio"], metrics["clip_fraction"]) == (pytest.approx(1.1), 0)
    loss.backward()
    for sign, gradient in zip((-1, 1), model.logprobs.grad.tolist(), strict=True):
        assert gradient == pytest.approx([0, sign * 0.5 * 1.5 * 1.1, sign * 0.5 * 0.2 * 1.1])
    assert float(scored.kl()) == pytest.approx(2 * (math.log(0.1 / 0.2) + math.log(0.5 / 0.1)))


def grpo(steps=5, **settings):
    return stage_of("grpo", steps=steps, staleness=1, max_response_tokens=16, **settings)


def nothing(what, number):
    pass


def test_the_next_step_is_drawn_while_this_one_is_learnt(tmp_path):
    """Both wait for each other in the midst of their work: one after the other, they would wait in vain."""
    together, alone = threading.Barrier(2, timeout=120), []

    def during(what, number):
        if (what == "generate" and number > 0) or (what == "learn" and number < 4):
            together.wait()
        elif what in ("generate", "learn"):
            alone.append((what, number))

    training = training_of(grpo(), tmp_path, during)
    receipt = overlapped(training)
    assert alone == [("generate", 0), ("learn", 4)]
    assert receipt.version == 5
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["staleness"] for row in steps] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("loop", [overlapped, in_turn])
def test_nothing_is_drawn_for_a_step_that_will_not_be(tmp_path, loop):
    stage = grpo(steps=3) if loop is overlapped else stage_of("grpo", steps=3)
    training = training_of(stage, tmp_path, nothing)
    loop(training)
    assert training.roles.rollout.done["generate"] == training.roles.policy.done["learn"] == 3


DRAWN, PROBED = 12, 2
LEARNT = 12 + 6 * 2


@pytest.mark.parametrize(
    ("limit", "learnt", "drawn", "tokens"),
    [
        ({"generated_tokens": 1}, 1, 1, DRAWN),
        ({"generated_tokens": DRAWN + 1}, 2, 2, 2 * DRAWN + PROBED),
        ({"gradient_tokens": 1}, 1, 2, 2 * DRAWN),
        ({"gradient_tokens": LEARNT + 1}, 2, 3, 3 * DRAWN + PROBED),
        ({"accelerator_seconds": 1e-9}, 0, 0, 0),
    ],
)
def test_a_budget_ends_it_where_it_ends_the_other_loop(tmp_path, limit, learnt, drawn, tokens):
    """Tokens count when their step takes them; a step that was drawn in vain, one at most, counts in the end."""
    counts = []
    for loop, stage in ((overlapped, grpo()), (in_turn, stage_of("grpo", steps=5))):
        folder = tmp_path / loop.__name__
        folder.mkdir()
        training = training_of(stage, folder, nothing, Budget(**limit))
        assert loop(training).version == learnt
        done = [training.roles.policy.done.get("learn", 0), training.roles.rollout.done.get("generate", 0)]
        counts.append((*done, training.context.tracker.generated_tokens))
    assert counts[0] == (learnt, drawn, tokens)
    assert counts[1] == (learnt, learnt, learnt * DRAWN)


def test_rollouts_that_are_older_than_stated_are_refused(tmp_path):
    training = training_of(grpo(agreement=Agreement(interval=100)), tmp_path, nothing)
    training.roles.rollout.lag = 2
    with pytest.raises(GuardError, match=r"served weight versions \[-2\], the policy is at 0 \(staleness 1\)"):
        overlapped(training)

    def during(what, number):
        training.roles.rollout.lag = int(what == "generate" and number == 3)

    training = training_of(grpo(agreement=Agreement(interval=100)), tmp_path, during)
    with pytest.raises(GuardError, match=r"served weight versions \[1\], the policy is at 3"):
        overlapped(training)


def test_probes_of_older_weights_are_refused(tmp_path):
    def during(what, number):
        training.roles.rollout.lag = int(what == "probe" and number == 1)

    training = training_of(grpo(), tmp_path, during)
    with pytest.raises(GuardError, match=r"served weight versions \[1\], the policy is at 2"):
        overlapped(training)


@pytest.mark.parametrize(("interval", "probes"), [(1, 4), (2, 2), (3, 1), (9, 0)])
def test_the_gate_asks_for_short_responses_at_its_interval(tmp_path, interval, probes):
    training = training_of(grpo(agreement=Agreement(interval=interval)), tmp_path, nothing)
    overlapped(training)
    assert training.roles.rollout.done.get("probe", 0) == probes
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, row in enumerate(steps) if "probe_agreement" in row] == [
        step for step in range(1, 5) if step % interval == 0
    ]
    assert training.context.tracker.generated_tokens == 5 * DRAWN + 2 * probes


def test_an_engine_that_drifts_from_the_trainer_stops_the_run(tmp_path):
    def during(what, number):
        training.roles.policy.gap = 0.25 if what == "learn" and number == 1 else training.roles.policy.gap

    training = training_of(grpo(), tmp_path, during)
    with pytest.raises(GuardError, match=r"differ by 0\.250 nats"):
        overlapped(training)
    assert training.roles.policy.done["learn"] == 2


def test_what_fails_in_the_engine_stops_the_run(tmp_path):
    def during(what, number):
        if (what, number) == ("generate", 2):
            raise GuardError("out of luck")

    training = training_of(grpo(), tmp_path, during)
    with pytest.raises(GuardError, match="out of luck"):
        overlapped(training)
    assert training.roles.policy.done["learn"] == 2
