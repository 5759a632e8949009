"""Roles that work side by side in threads of their own, as actors do, and a training of them by the real loops."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from online_made import context_of, prompts_of

from rlhf.recipe.base import Budget
from rlhf.roles import Ready, Roles, WeightReceipt
from rlhf.stages.online_step import Training
from rlhf.stages.overlap import PROBE_TOKENS
from rlhf.stages.policy_gradient import PolicyGradient, start_estimator
from rlhf.types import Metrics, Rollout, TokenScores

DEADLINE_S = 60.0
During = Callable[[str, int], None]


class Later:
    def __init__(self, future: Future) -> None:
        self.future = future

    def result(self) -> Any:
        return self.future.result(timeout=DEADLINE_S)


class Worker:
    """Does what it is asked, one thing after another; `during` is called in the midst of each, with its number."""

    def __init__(self, during: During) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.during = during
        self.done: dict[str, int] = {}

    def ask(self, work: Callable[..., Any], *arguments: Any) -> Later:
        return Later(self.pool.submit(work, *arguments))

    def do(self, what: str) -> None:
        number = self.done.get(what, 0)
        self.during(what, number)
        self.done[what] = number + 1


class Engine(Worker):
    """Gives k + 1 tokens to the k-th sample of a prompt; `lag` makes it claim older weights than it has."""

    version = 0
    lag = 0
    answering = 0

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> Later:
        self.answering += 1
        return self.ask(self._generate, prompts, sampling, seeds)

    def _generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[Rollout]:
        self.do("probe" if sampling.max_tokens == PROBE_TOKENS else "generate")
        version = self.version - self.lag
        drawn = [
            Rollout(prompt, (7,) * (k + 1), (-1.0,) * (k + 1), f"{k}", "stop", version, seed)
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
            for k, seed in enumerate(of_prompt)
        ]
        self.answering -= 1
        return drawn


class Learner(Worker):
    """Policy and reference: finds each token `gap` nats more likely than the engine did."""

    gap = 0.0

    def logprobs(self, batch: Any) -> Later:
        found = (batch.rollout_logprobs + self.gap).masked_fill(~batch.response_mask, 0)
        return self.ask(TokenScores, found, torch.zeros(found.shape))

    def train(self, batch: Any, objective: Any, minibatches: Any, lr_scale: float) -> Later:
        return self.ask(self._train)

    def _train(self) -> Metrics:
        self.do("learn")
        return Metrics.of(1, skipped_steps=0.0)

    def publish(self, engine: Engine, version: int) -> Later:
        return self.ask(self._publish, engine, version)

    def _publish(self, engine: Engine, version: int) -> WeightReceipt:
        assert engine.answering == 0, "new weights came while the engine was generating"
        self.do("publish")
        engine.version = version
        return WeightReceipt(version, "", 0, 0.0)

    def save(self, folder: Path) -> Ready[None]:
        return Ready(None)


class Lengths:
    """A reward: the number of tokens."""

    def score(self, rollouts: Any) -> Ready[torch.Tensor]:
        return Ready(torch.tensor([float(len(rollout.tokens)) for rollout in rollouts]))


def training_of(stage: Any, folder: Path, during: During, budget: Budget | None = None) -> Training:
    """Return a training on 12 prompts of such roles; `during` runs in their threads."""
    context = context_of(stage, folder, budget)
    policy: Any = Learner(during)
    method = PolicyGradient(stage, context, policy, start_estimator(stage, context))
    roles = Roles(policy, policy, Lengths(), Engine(during))
    return Training(stage, context, roles, method, None, prompts_of(12), 0)
