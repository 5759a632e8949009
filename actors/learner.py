"""The Ray actors that hold a policy, reference, reward model or critic, and their face to the controller."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import ray
import torch
from torch import Tensor

from actors.group import RankGroup
from actors.objects import Shipped, once
from actors.progress import tell_progress
from actors.rollout import RayRollout
from actors.supervise import RayPending, Retried
from actors.turns import SharingRollout
from actors.weights import publish
from rlhf.engines.base import B, LearnerSpec, Objective
from rlhf.engines.learner import ModelLearner
from rlhf.engines.shares import Part, assemble, token_scores
from rlhf.errors import ResourceError
from rlhf.manifest import Seal
from rlhf.recipe.tuning_support import support
from rlhf.roles import Pending, RolloutEngine, WeightReceipt
from rlhf.types import Metrics, TokenBatch, TokenScores, ValueBatch

if TYPE_CHECKING:
    from ray.actor import ActorHandle

T = TypeVar("T")


SHIPPED = Shipped()
"""Shared by all roles, so that a batch that several of them read is put once."""


class LearnerActor(ModelLearner):
    """One rank of a role. It outlives stages; the model in it is built for each stage that needs it."""

    def __init__(self) -> None:
        self.rank = 0
        tell_progress()

    def devices(self) -> list[str]:
        """Return the numbers of the GPUs that Ray gave this process, as CUDA_VISIBLE_DEVICES takes them."""
        return [str(number) for number in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    def meeting_point(self) -> tuple[str, int]:
        """Return this machine's address and a port of it at which the ranks can meet."""
        from rlhf.engines.ranks import listen

        address = ray.util.get_node_ip_address()
        return address, listen(address)

    def join(self, rank: int, ranks: int, address: str, port: int, timeout_s: float) -> None:
        """Meet the other ranks; `timeout_s` is the deadline of every collective from then on."""
        from rlhf.engines.ranks import join

        self.rank = rank
        join(rank, ranks, address, port, timeout_s)

    def build(self, spec: LearnerSpec) -> int:
        """Build the model of a stage, or this rank's share of it, and return this process's id."""
        self.drop()
        if self.devices() and not torch.cuda.is_available():
            raise ResourceError("Ray gave this process a GPU, but torch finds none: is it torch's CPU build?")
        super().__init__(spec)
        return os.getpid()

    def drop(self) -> None:
        """Free the model and its optimizer."""
        rank = self.rank
        if "model" in self.__dict__:
            self.close()
        self.__dict__.clear()
        self.rank = rank
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def offload(self) -> None:
        """Move the model, where there is one, to main memory."""
        if "model" in self.__dict__:
            super().offload()

    def reload(self) -> None:
        """Move the model, where there is one, back to the device."""
        if "model" in self.__dict__:
            super().reload()

    def base_logprobs(self, batch: TokenBatch) -> Part:
        """Score the response tokens of this rank's rows with the adapters off."""
        return self.logprobs(batch, "base")

    def publish(self, engines: list[ActorHandle], version: int, deadline_s: float) -> WeightReceipt:
        """Take part in sending the weights to the engines, as these want them; return their acknowledgement."""
        served = self.spec.tuning is not None and support(self.spec.tuning).served
        return publish(self.weights, engines, version, deadline_s, self.rank, self if served else None)


class RayModel:
    """A `Policy`, `Reference`, `Reward` or `Critic` in other processes."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.published = 0
        self.trained = False
        self.lock = threading.Lock()

    def train(
        self, batch: B, objective: Objective[B], minibatches: Sequence[Sequence[int]], lr_scale: float
    ) -> Pending[Metrics]:
        """Step once per minibatch at `lr_scale` times the base learning rates."""
        with self.lock:
            self.trained = True
            return self.group.ask("train", _first, SHIPPED(batch), objective, once(minibatches), lr_scale)

    def evaluate(self, batch: B, objective: Objective[B]) -> Pending[Metrics]:
        """Return the objective's metrics with no gradient."""
        return self.group.ask("evaluate", _merged, SHIPPED(batch), objective)

    def logprobs(self, batch: TokenBatch) -> Pending[TokenScores]:
        """Score the response tokens, `[B, T]`."""
        return self.group.ask("logprobs", token_scores, SHIPPED(batch))

    def base_logprobs(self, batch: TokenBatch) -> Pending[TokenScores]:
        """Score the response tokens with the adapters off, `[B, T]`."""
        return self.group.ask("base_logprobs", token_scores, SHIPPED(batch))

    def scores(self, batch: TokenBatch) -> Pending[Tensor]:
        """Return the reward of each whole sequence, `[B]`."""
        return self.group.ask("scores", assemble, SHIPPED(batch))

    def values(self, batch: TokenBatch) -> Pending[Tensor]:
        """Return the value before each response token, `[B, T]`."""
        return self.group.ask("values", assemble, SHIPPED(batch))

    def fit_values(self, batch: ValueBatch) -> Pending[Tensor]:
        """Fit the head to the returns; return the values before each response token, `[B, T]`."""
        return self.group.ask("fit_values", assemble, SHIPPED(batch))

    def standardise(self, mean: float, std: float) -> Pending[None]:
        """Fold (score - mean) / std into the head."""
        return self.group.ask("standardise", _first, mean, std)

    def save(self, folder: Path) -> Pending[None]:
        """Write a Hugging Face folder with adapters merged, and the tokenizer."""
        return self.group.ask("save", _first, folder)

    def save_adapter(self, folder: Path) -> Pending[None]:
        """Write a PEFT folder of the adapters."""
        return self.group.ask("save_adapter", _first, folder)

    def state_bytes(self) -> Pending[int]:
        """Return the bytes that `save_state` writes."""
        return self.group.ask("state_bytes", _first)

    def save_state(self, folder: Path) -> Pending[dict[str, Seal]]:
        """Let every rank write, flush and seal its share of what training goes on from; return all seals by name."""
        return self.group.ask("save_state", _together, folder)

    def load_state(self, folder: Path) -> Pending[None]:
        """Go on from it."""
        return self.group.ask("load_state", _first, folder)

    def offload(self) -> Pending[None]:
        """Move weights and optimizer out of accelerator memory."""
        return self.group.ask("offload", _first)

    def reload(self) -> Pending[None]:
        """Move them back."""
        return self.group.ask("reload", _first)

    def publish(self, engine: RolloutEngine, version: int) -> Pending[WeightReceipt]:
        """Send the merged weights to every replica of the engine, and later to those that replace one."""
        assert isinstance(engine, RayRollout)
        with self.lock:
            self.published, self.trained = version, False
        engine.source = partial(self._send_present, engine)
        return Retried(engine, lambda: self._send(engine, engine.handles(), version))

    def _send_present(self, engine: RayRollout, replicas: list[ActorHandle]) -> RayPending[WeightReceipt]:
        """Send what the model is now: what it published last, or the next version where it was trained since."""
        with self.lock:
            return self._send(engine, replicas, self.published + self.trained)

    def _send(
        self, engine: RayRollout, replicas: list[ActorHandle] | ray.ObjectRef, version: int
    ) -> RayPending[WeightReceipt]:
        begin = self.group.call
        if isinstance(engine, SharingRollout):
            engine.turns.publish()
            begin = self.group.begin
        return self.group.pending("publish", begin("publish", replicas, version, self.group.deadline_s), _first)


def _first(values: list[T]) -> T:
    return values[0]


def _together(values: list[dict[str, Seal]]) -> dict[str, Seal]:
    return {name: seal for share in values for name, seal in share.items()}


def _merged(values: list[Metrics]) -> Metrics:
    return reduce(Metrics.merge, values)
