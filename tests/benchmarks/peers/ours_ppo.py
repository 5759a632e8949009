"""Our PPO as whole steps in one process: vLLM's rollouts, the four roles, and the weights back into the engine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from rlhf.algorithms.advantages import gae, token_rewards
from rlhf.algorithms.masked import masked_mean, whiten
from rlhf.data.collate import collate_rollouts
from rlhf.engines.base import RolloutSpec
from rlhf.engines.policy_objectives import ClippedPolicy, ClippedValue
from rlhf.engines.shared_memory import send
from rlhf.engines.shares import assemble
from rlhf.engines.vllm_generate import VllmEngine
from rlhf.recipe.role_schema import RolloutRole
from rlhf.types import Experience, Prompt, Sampling, TokenBatch, ValueBatch
from tests.benchmarks.peers.ours import learner, logprobs
from tests.benchmarks.peers.task import BETA, PAD, PPO_EPOCHS, RESPONSE, Example, Outcome, Task


class Ppo:
    """Engine and roles of one process."""

    def __init__(self, task: Task) -> None:
        folder = Path(task.causal)
        longest = max(len(e.prompt) for step in task.examples() for e in step)
        role = RolloutRole()
        self.engine = VllmEngine(RolloutSpec(folder, "bfloat16", role, longest + RESPONSE, task.threads, seed=3))
        self.policy = learner(task, "policy", "causal")
        self.reference = learner(task, "reference", "causal", trained=False)
        self.reward = learner(task, "reward", "scalar", trained=False)
        self.critic = learner(task, "critic", "scalar")
        self.version = 0
        self.recomputes = task.old_logprobs == "recompute"

    def sample(self, examples: list[Example]) -> TokenBatch:
        """Return prompts and sampled responses."""
        prompts = [Prompt(str(row), tuple(e.prompt), "") for row, e in enumerate(examples)]
        seeds = [[self.version * len(prompts) + row] for row in range(len(prompts))]
        return collate_rollouts(self.engine.generate(prompts, Sampling(RESPONSE), seeds), PAD)

    def judge(self, batch: TokenBatch) -> tuple[Experience, ValueBatch]:
        """Ask every role, and estimate the advantages, as TRL does: KL (k1) in the reward, GAE, whitened."""
        mask = batch.response_mask
        old = logprobs(self.policy, batch).logprobs if self.recomputes else batch.rollout_logprobs
        ref = logprobs(self.reference, batch).logprobs
        scores, values = assemble([self.reward.scores(batch)]), assemble([self.critic.values(batch)])
        kl = (old - ref).masked_fill(~mask, 0)
        advantages, returns = gae(token_rewards(scores, kl, mask, BETA["ppo"]), values, mask, 1.0, 0.95)
        experience = Experience(
            batch=replace(batch, rollout_logprobs=old),
            scores=scores,
            kl=kl,
            old_logprobs=old,
            ref_logprobs=ref,
            advantages=whiten(advantages, mask),
        )
        return experience, ValueBatch(batch, values, returns)

    def learn(self, experience: Experience, values: ValueBatch) -> None:
        """Train policy and critic on the whole batch, once an epoch."""
        minibatches = [list(range(len(experience)))] * PPO_EPOCHS
        policy = ClippedPolicy(
            clip_range=0.2,
            clip_range_high=0.2,
            importance_cap=2.0,
            temperature=1.0,
            aggregation="token",
            max_response_tokens=RESPONSE,
            kl_coef=0.0,
            kl_estimator="k1",
        )
        self.policy.train(experience, policy, minibatches, 1.0)
        self.critic.train(values, ClippedValue(0.2), minibatches, 1.0)

    def publish(self) -> None:
        """Bring the policy's weights into the engine."""
        self.version += 1
        self.engine.start_weight_update()
        send(self.policy.weights(), self.engine.update_weights)
        self.engine.finish_weight_update()
        self.engine.update_weight_version(self.version)


def train_ppo(task: Task, outcome: Outcome) -> None:
    """Make the task's steps; `parts` has the seconds of each phase, `losses` the mean NLL of the sampled tokens."""
    ppo = Ppo(task)
    torch.set_num_threads(task.threads)
    for examples in task.examples():
        started = time.perf_counter()
        batch = ppo.sample(examples)
        sampled = time.perf_counter()
        experience, values = ppo.judge(batch)
        judged = time.perf_counter()
        ppo.learn(experience, values)
        learned = time.perf_counter()
        ppo.publish()
        ended = time.perf_counter()
        outcome.seconds.append(ended - started)
        laps = {"sample": sampled - started, "judge": judged - sampled, "learn": learned - judged}
        outcome.parts.append(laps | {"publish": ended - learned})
        outcome.losses.append(-float(masked_mean(experience.old_logprobs, batch.response_mask)))
        outcome.tokens += batch.token_count()
