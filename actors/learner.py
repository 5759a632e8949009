"""The Ray actor that holds a policy, reference, reward model or critic, and its face to the controller."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import torch
from torch import Tensor

from actors.rollout import RayRollout
from actors.supervise import RayPending
from actors.weights import publish
from rlhf.engines.base import B, LearnerSpec, Objective
from rlhf.engines.learner import ModelLearner
from rlhf.roles import RolloutEngine, WeightReceipt
from rlhf.types import Metrics, TokenBatch, TokenScores

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class LearnerActor(ModelLearner):
    """One process of a role. It outlives stages; the model in it is built for each stage that needs it."""

    def __init__(self) -> None:
        pass

    def build(self, spec: LearnerSpec) -> int:
        """Build the model of a stage and return this process's id."""
        self.drop()
        super().__init__(spec)
        return os.getpid()

    def drop(self) -> None:
        """Free the model and its optimizer."""
        self.__dict__.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def base_logprobs(self, batch: TokenBatch) -> TokenScores:
        """Score the response tokens with the adapters off, `[B, T]`."""
        return self.logprobs(batch, "base")

    def publish(self, engines: list[ActorHandle], version: int, deadline_s: float) -> WeightReceipt:
        """Send the merged weights to the engines and return their common acknowledgement."""
        return publish(self.weights, engines, version, deadline_s)


class RayModel:
    """A `Policy`, `Reference`, `Reward` or `Critic` in another process."""

    def __init__(self, actor: ActorHandle, role: str, deadline_s: float, building: ray.ObjectRef) -> None:
        self.actor = actor
        self.role = role
        self.deadline_s = deadline_s
        self.building = building

    def train(
        self, batch: B, objective: Objective[B], minibatches: Sequence[Sequence[int]], lr_scale: float
    ) -> RayPending[Metrics]:
        """Step once per minibatch at `lr_scale` times the base learning rates."""
        return self._pending(self.actor.train.remote(batch, objective, minibatches, lr_scale), "train")

    def evaluate(self, batch: B, objective: Objective[B]) -> RayPending[Metrics]:
        """Return the objective's metrics with no gradient."""
        return self._pending(self.actor.evaluate.remote(batch, objective), "evaluate")

    def logprobs(self, batch: TokenBatch) -> RayPending[TokenScores]:
        """Score the response tokens, `[B, T]`."""
        return self._pending(self.actor.logprobs.remote(batch), "logprobs")

    def base_logprobs(self, batch: TokenBatch) -> RayPending[TokenScores]:
        """Score the response tokens with the adapters off, `[B, T]`."""
        return self._pending(self.actor.base_logprobs.remote(batch), "base_logprobs")

    def scores(self, batch: TokenBatch) -> RayPending[Tensor]:
        """Return the reward of each whole sequence, `[B]`."""
        return self._pending(self.actor.scores.remote(batch), "scores")

    def values(self, batch: TokenBatch) -> RayPending[Tensor]:
        """Return the value before each response token, `[B, T]`."""
        return self._pending(self.actor.values.remote(batch), "values")

    def standardise(self, mean: float, std: float) -> RayPending[None]:
        """Fold (score - mean) / std into the head."""
        return self._pending(self.actor.standardise.remote(mean, std), "standardise")

    def save(self, folder: Path) -> RayPending[None]:
        """Write a Hugging Face folder with adapters merged, and the tokenizer."""
        return self._pending(self.actor.save.remote(folder), "save")

    def publish(self, engine: RolloutEngine, version: int) -> RayPending[WeightReceipt]:
        """Send the merged weights to every replica of the engine."""
        assert isinstance(engine, RayRollout)
        sent = self.actor.publish.remote(engine.replicas, version, self.deadline_s)
        return self._pending(sent, "publish")

    def _pending(self, reference: object, method: str) -> RayPending:
        return RayPending([self.building, reference], f"{self.role}.{method}", self.deadline_s)
