"""Our arm: `python -m tests.benchmarks.peers.ours task.json outcome.json`.

Steps go through the public learner, with bfloat16 weights, float32 masters and the recipes' default pass size. A step
begins with a padded batch in memory, as the peer's does, and ends when the weights have moved. For groups it holds
everything the stages do with given completions: the reference's logprobs, the advantages, the update and, unless those
of the engine that sampled are taken (`old_logprobs: rollout`, computed outside the clock here), the policy's own.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from rlhf.algorithms.advantages import group_normalised, leave_one_out, to_tokens
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.preference import dpo_loss
from rlhf.data.collate import collate, collate_pairs
from rlhf.data.sequences import TokenPair, answered
from rlhf.engines.base import LearnerSpec, Objective
from rlhf.engines.learner import ModelLearner
from rlhf.engines.objectives import RewardModel, Sft
from rlhf.engines.policy_objectives import ClippedPolicy
from rlhf.engines.preference_objectives import Preference
from rlhf.engines.shares import token_scores
from rlhf.recipe.base import Optimizer
from rlhf.recipe.role_schema import RoleName
from rlhf.recipe.schedule import CPU_PASS
from rlhf.recipe.tuning_schema import Full
from rlhf.types import Experience, PreferenceBatch, Rows, TokenBatch, TokenScores
from tests.benchmarks.peers.task import BETA, LEARNING_RATE, PAD, Example, Outcome, Task, reward_of

PASS_TOKENS = CPU_PASS


def learner(task: Task, role: RoleName, kind: Literal["causal", "scalar"], trained: bool = True) -> ModelLearner:
    """Build a model on the task's threads; a trained one has AdamW as the peer's."""
    spec = LearnerSpec(
        role=role,
        kind=kind,
        checkpoint=Path(task.causal if kind == "causal" else task.scalar),
        dtype="bfloat16",
        tuning=Full() if trained else None,
        optimizer=Optimizer(learning_rate=LEARNING_RATE, schedule="constant") if trained else None,
        head_learning_rate=None,
        max_tokens_per_microbatch=PASS_TOKENS,
        temperature=1.0,
        threads=task.threads,
        seed=3,
    )
    return ModelLearner(spec)


@contextmanager
def clock(into: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes."""
    started = time.perf_counter()
    yield
    into.append(time.perf_counter() - started)


def logprobs(model: ModelLearner, batch: TokenBatch) -> TokenScores:
    """Score the response tokens of the whole batch."""
    return token_scores([model.logprobs(batch)])


def sequences(examples: list[Example]) -> TokenBatch:
    """Return a row for each completion, its prompt before it."""
    rows = [answered(tuple(e.prompt), tuple(completion)) for e in examples for completion in e.completions]
    return collate(rows, PAD)


def pairs(examples: list[Example]) -> PreferenceBatch:
    """Return each example's two completions as a pair."""
    sides = [[answered(tuple(e.prompt), tuple(completion)) for completion in e.completions] for e in examples]
    return collate_pairs([TokenPair(chosen, rejected, 0.0) for chosen, rejected in sides], PAD)


def update(model: ModelLearner, batch: Rows, objective: Objective[Any], outcome: Outcome) -> None:
    """Make one step over the whole batch."""
    metrics = model.train(batch, objective, [range(len(batch))], 1.0)
    outcome.grad_norms.append(metrics["grad_norm"])
    if "loss" in metrics:
        outcome.losses.append(metrics["loss"])


def supervised(task: Task, outcome: Outcome) -> None:
    """Train on completions, or on pairs with a reward model."""
    kind: Literal["causal", "scalar"] = "scalar" if task.row == "reward" else "causal"
    objective: Objective[Any] = RewardModel() if task.row == "reward" else Sft()
    model = learner(task, "reward" if task.row == "reward" else "policy", kind)
    for examples in task.examples():
        batch = pairs(examples) if task.row == "reward" else sequences(examples)
        with clock(outcome.seconds):
            update(model, batch, objective, outcome)
        outcome.tokens += batch.token_count()


def preference(task: Task, outcome: Outcome) -> None:
    """Train with DPO; the reference's logprobs are computed up front, as the stage does, on a clock of their own."""
    model = learner(task, "policy", "causal")
    objective = Preference(partial(dpo_loss, beta=BETA["dpo"]))
    batches = []
    for examples in task.examples():
        batch = pairs(examples)
        with clock(outcome.reference_seconds):
            sides = sequences(examples)  # chosen and rejected as neighbours, which share their prompt
            sums = sequence_logprobs(logprobs(model, sides).logprobs, sides.response_mask)
            batches.append(replace(batch, chosen_ref_logprobs=sums[::2], rejected_ref_logprobs=sums[1::2]))
    for batch in batches:
        with clock(outcome.seconds):
            update(model, batch, objective, outcome)
        outcome.tokens += batch.token_count()


def group(task: Task, outcome: Outcome) -> None:
    """Train with GRPO (token mean, KL in the loss) or RLOO (sequence sums, KL in the reward) on given completions."""
    policy, reference = learner(task, "policy", "causal"), learner(task, "reference", "causal", trained=False)
    grpo, beta = task.row == "grpo", BETA[task.row]
    objective = ClippedPolicy(
        clip_range=0.2,
        clip_range_high=0.2,
        importance_cap=2.0,
        temperature=1.0,
        aggregation="token" if grpo else "constant",
        max_response_tokens=1,
        kl_coef=beta if grpo else 0.0,
        kl_estimator="k3",
    )
    for examples in task.examples():
        batch = sequences(examples)
        scores = torch.tensor([reward_of(completion) for e in examples for completion in e.completions])
        groups = torch.arange(len(examples)).repeat_interleave(len(examples[0].completions))
        given = logprobs(policy, batch).logprobs if task.old_logprobs == "rollout" else None
        with clock(outcome.seconds):
            old = logprobs(policy, batch).logprobs if given is None else given
            batch = replace(batch, rollout_logprobs=old)
            experience = _experience(batch, logprobs(reference, batch).logprobs, scores, groups, task.row)
            metrics = policy.train(experience, objective, [range(len(batch))], 1.0)
        outcome.grad_norms.append(metrics["grad_norm"])
        if grpo:  # RLOO's loss of token sums has another constant than the peer's of sequence ratios; gradients agree
            outcome.losses.append(metrics["policy_loss"] + beta * metrics["kl_loss"])
        outcome.tokens += batch.token_count()


def _experience(batch: TokenBatch, ref: Tensor, scores: Tensor, groups: Tensor, row: str) -> Experience:
    old, mask = batch.rollout_logprobs, batch.response_mask
    kl = kl_estimate(old, ref, "k3" if row == "grpo" else "k1").masked_fill(~mask, 0)
    if row == "grpo":
        compared = group_normalised(scores, groups)
    else:
        compared = leave_one_out(scores - BETA[row] * kl.sum(dim=1), groups)
    return Experience(
        batch=batch,
        scores=scores,
        kl=kl,
        old_logprobs=old,
        ref_logprobs=ref,
        advantages=to_tokens(compared, mask),
    )


ARMS: dict[str, Callable[[Task, Outcome], None]] = {
    "sft": supervised,
    "reward": supervised,
    "dpo": preference,
    "grpo": group,
    "rloo": group,
}


def main(task_file: Path, outcome_file: Path) -> None:
    """Run the task, and write what it measured."""
    task, outcome = Task.read(task_file), Outcome()
    torch.set_num_threads(task.threads)
    if task.row == "ppo":
        from tests.benchmarks.peers.ours_ppo import train_ppo

        train_ppo(task, outcome)
    else:
        ARMS[task.row](task, outcome)
    outcome.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome.versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    outcome.write(outcome_file)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
