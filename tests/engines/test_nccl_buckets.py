"""What vLLM's NCCL sender is made to do, with the broadcast itself replaced: it needs GPUs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.gpu_weights import bounded
from actors.replicas import ReplicaClient
from rlhf.engines.vllm_transfer import BucketedNccl, ReplayedSource, buckets
from rlhf.errors import TrainingError

pytestmark = pytest.mark.vllm


class Recorder:
    """The engines' side, which notes the calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, announcement: dict[str, Any]) -> None:
        self.calls.append(announcement["names"])

    def finish_weight_update(self) -> None:
        self.calls.append("finish")


class Sender(BucketedNccl):
    """Keeps what it would broadcast."""

    def _broadcast(self, source: Any, meta: Any) -> None:
        self.sent = [*getattr(self, "sent", []), *self._checked_iter(source, meta)]


def reusing() -> Any:
    """Weights in one memory, each good until the next is asked for, as a sharded policy gives them."""
    memory = torch.empty(4)
    for value in range(5):
        yield f"w{value}", memory.fill_(value)


def test_buckets_are_copies_and_hold_what_fits():
    cut = list(buckets([*reusing_values(), ("large", torch.zeros(100))], 32))
    assert [[name for name, _ in bucket] for bucket in cut] == [["w0", "w1"], ["w2", "w3"], ["w4"], ["large"]]
    cut = list(buckets(reusing(), 32))
    assert [float(tensor[0]) for bucket in cut for _, tensor in bucket] == [0, 1, 2, 3, 4]


def reusing_values() -> list[tuple[str, Tensor]]:
    return [(name, tensor.clone()) for name, tensor in reusing()]


def test_rank_0_announces_and_broadcasts_bucket_by_bucket(monkeypatch):
    monkeypatch.setattr("rlhf.engines.vllm_transfer.BUCKET_BYTES", 32)
    client = Recorder()
    sender = Sender(client=client, source=ReplayedSource(reusing))
    sender.send_weights()
    assert client.calls == ["start", ["w0", "w1"], ["w2", "w3"], ["w4"], "finish"]
    assert [(name, tensor.tolist()) for name, tensor in sender.sent] == [(f"w{n}", [n] * 4) for n in range(5)]


def test_other_ranks_only_take_part_in_gathering():
    client = Recorder()
    asked = []

    def gathering() -> Any:
        for item in reusing():
            asked.append(item[0])
            yield item

    sender = Sender(client=client, source=ReplayedSource(gathering), is_sender=False)
    sender.send_weights()
    assert asked == ["w0", "w1", "w2", "w3", "w4"]
    assert client.calls == []
    assert not hasattr(sender, "sent")


def test_an_engine_that_refuses_is_told():
    class Refusing(Recorder):
        def update_weights(self, announcement: dict[str, Any]) -> None:
            raise TrainingError("rollout-0.update_weights: no room")

    with pytest.raises(TrainingError, match="no room"):
        Sender(client=Refusing(), source=ReplayedSource(reusing)).send_weights()


def test_a_collective_that_hangs_ends_at_the_deadline_or_when_a_replica_fails():
    client = ReplicaClient([], 1.0)
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"for longer than ray\.call_timeout_s"):
        bounded(lambda: time.sleep(600), client)
    client = ReplicaClient([], 300.0)
    client.failure = TrainingError("rollout-1.update_weights: the process died")
    with pytest.raises(TrainingError, match="rollout-1"):
        bounded(lambda: time.sleep(600), client)
    with pytest.raises(MemoryError):
        bounded(lambda: (_ for _ in ()).throw(MemoryError()), ReplicaClient([], 300.0))
    assert time.monotonic() - started < 120
