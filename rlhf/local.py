"""All roles in this process: for a debugger, for tests, and for `rlhf run --local`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from rlhf.engines.base import B, LearnerSpec, Objective, RolloutSpec
from rlhf.engines.hf_generate import TransformersEngine
from rlhf.engines.learner import ModelLearner
from rlhf.engines.shares import assemble, token_scores
from rlhf.fingerprint import architecture_digest
from rlhf.manifest import Seal
from rlhf.recipe.schema import Recipe
from rlhf.roles import EnginePart, Ready, RolloutEngine, WeightReceipt
from rlhf.types import Metrics, Prompt, Rollout, Sampling, TokenBatch, TokenScores, ValueBatch


class LocalModel:
    """A `Policy`, `Reference`, `Reward` or `Critic` whose calls run here and now."""

    def __init__(self, spec: LearnerSpec) -> None:
        self.learner = ModelLearner(replace(spec, ranks=1, offload="none"))

    def train(
        self, batch: B, objective: Objective[B], minibatches: Sequence[Sequence[int]], lr_scale: float
    ) -> Ready[Metrics]:
        """Step once per minibatch."""
        return Ready(self.learner.train(batch, objective, minibatches, lr_scale))

    def evaluate(self, batch: B, objective: Objective[B]) -> Ready[Metrics]:
        """Return the objective's metrics."""
        return Ready(self.learner.evaluate(batch, objective))

    def logprobs(self, batch: TokenBatch) -> Ready[TokenScores]:
        """Score the response tokens."""
        return Ready(token_scores([self.learner.logprobs(batch)]))

    def base_logprobs(self, batch: TokenBatch) -> Ready[TokenScores]:
        """Score the response tokens with the adapters off."""
        return Ready(token_scores([self.learner.logprobs(batch, "base")]))

    def scores(self, batch: TokenBatch) -> Ready[Tensor]:
        """Return sequence rewards."""
        return Ready(assemble([self.learner.scores(batch)]))

    def values(self, batch: TokenBatch) -> Ready[Tensor]:
        """Return token values."""
        return Ready(assemble([self.learner.values(batch)]))

    def fit_values(self, batch: ValueBatch) -> Ready[Tensor]:
        """Fit the head to the returns."""
        return Ready(assemble([self.learner.fit_values(batch)]))

    def standardise(self, mean: float, std: float) -> Ready[None]:
        """Fold (score - mean) / std into the head."""
        self.learner.standardise(mean, std)
        return Ready(None)

    def save(self, folder: Path) -> Ready[None]:
        """Write the merged model."""
        self.learner.save(folder)
        return Ready(None)

    def save_adapter(self, folder: Path) -> Ready[None]:
        """Write the adapters."""
        self.learner.save_adapter(folder)
        return Ready(None)

    def state_bytes(self) -> Ready[int]:
        """Return the bytes that `save_state` writes."""
        return Ready(self.learner.state_bytes())

    def save_state(self, folder: Path) -> Ready[dict[str, Seal]]:
        """Write what training goes on from; return the files' seals."""
        return Ready(self.learner.save_state(folder))

    def load_state(self, folder: Path) -> Ready[None]:
        """Go on from it."""
        self.learner.load_state(folder)
        return Ready(None)

    def offload(self) -> Ready[None]:
        """Move weights and optimizer out of accelerator memory."""
        self.learner.offload()
        return Ready(None)

    def reload(self) -> Ready[None]:
        """Move them back."""
        self.learner.reload()
        return Ready(None)

    def publish(self, engine: RolloutEngine, version: int) -> Ready[WeightReceipt]:
        """Copy the merged weights into the engine."""
        assert isinstance(engine, LocalRollout)
        return Ready(engine.receive(self.learner, version))


class LocalRollout:
    """A `RolloutEngine` in this process."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.engine = TransformersEngine(spec)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Ready[list[Rollout]]:
        """Draw one response per (prompt, seed)."""
        return Ready(self.engine.generate(prompts, sampling, seeds))

    def load(self, folder: Path, version: int) -> Ready[WeightReceipt]:
        """Serve the weights of a folder."""
        start = time.perf_counter()
        checksum = self.engine.load(folder, version)
        return Ready(WeightReceipt(version, checksum, 0, time.perf_counter() - start))

    def sleep(self) -> Ready[None]:
        """Nothing to do: `transformers` keeps no cache between calls, and its weights are this process's."""
        return Ready(None)

    def wake(self, part: EnginePart) -> Ready[None]:
        """Nothing to do."""
        return Ready(None)

    def receive(self, learner: ModelLearner, version: int) -> WeightReceipt:
        """Serve the learner's merged weights."""
        start = time.perf_counter()
        checksum = self.engine.load_weights(learner.weights(), version)
        size = sum(p.numel() * p.element_size() for p in self.engine.model.parameters())
        return WeightReceipt(version, checksum, size, time.perf_counter() - start)


class LocalLauncher:
    """Builds roles in this process; generation is by transformers."""

    def __init__(self, recipe: Recipe) -> None:
        self.name = recipe.name
        self.engine: LocalRollout | None = None
        self.shape = ""
        self.judging: tuple[RolloutSpec, LocalRollout] | None = None

    def policy(self, spec: LearnerSpec) -> LocalModel:
        """Build the policy."""
        return LocalModel(spec)

    def reference(self, spec: LearnerSpec) -> LocalModel:
        """Build the reference."""
        return LocalModel(spec)

    def reward(self, spec: LearnerSpec) -> LocalModel:
        """Build the reward model."""
        return LocalModel(spec)

    def critic(self, spec: LearnerSpec) -> LocalModel:
        """Build the critic."""
        return LocalModel(spec)

    def rollout(self, spec: RolloutSpec) -> LocalRollout:
        """Build the engine; a later checkpoint of the same architecture is loaded into it."""
        shape = architecture_digest(spec.checkpoint)
        if self.engine is None or shape != self.shape:
            self.engine, self.shape = LocalRollout(spec), shape
        else:
            self.engine.load(spec.checkpoint, 0)
        return self.engine

    def judge(self, spec: RolloutSpec) -> LocalRollout:
        """Build the judge's engine, unless the one that is there is the same."""
        if self.judging is None or self.judging[0] != spec:
            self.judging = None  # its memory goes before the next one's comes
            self.judging = spec, LocalRollout(spec)
        return self.judging[1]

    def seconds_in_turns(self) -> float:
        """Return 0: nothing changes hands in one process."""
        return 0.0

    def recover(self) -> None:
        """Do nothing: there are no processes that can be lost."""

    def release(self) -> None:
        """Nothing to do: models end with their last reference."""

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop the engines."""
        self.engine = None
        self.judging = None
