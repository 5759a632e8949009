"""Turns on shared devices: whoever is called holds the memory, the other has let go of it before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.turns import SharingRollout, Turns
from rlhf.roles import Ready
from rlhf.types import Sampling


class Log(list[str]):
    """What happened, in order."""

    def take(self) -> list[str]:
        taken, self[:] = list(self), []
        return taken


class Models:
    """A role's processes: what is done to them, and what must come before a call."""

    def __init__(self, log: Log, name: str) -> None:
        self.log = log
        self.name = name
        self.before_call = lambda: None

    def call(self, method: str) -> None:
        self.before_call()
        self.log.append(f"{self.name}.{method}")

    def wait(self, method: str) -> None:
        self.log.append(f"{self.name}.{method}")


class Engine:
    def __init__(self, log: Log) -> None:
        self.log = log

    def sleep(self) -> Ready[None]:
        self.log.append("engine.sleep")
        return Ready(None)

    def wake(self, part: str) -> Ready[None]:
        self.log.append(f"engine.wake {part}")
        return Ready(None)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def turns(log: Log) -> Turns:
    """Policy and critic share with an engine that has just started."""
    made = Turns()
    for name in ("policy", "critic"):
        made.join(Models(log, name))  # type: ignore[arg-type]
    made.begin()
    made.began(Engine(log))  # type: ignore[arg-type]
    return made


def models(turns: Turns) -> list[Any]:
    return list(turns.groups)


def test_models_make_room_before_an_engine_starts(log, turns):
    assert log.take() == ["policy.offload", "critic.offload"]


def test_a_step_changes_hands_once_each_way(log, turns):
    policy, critic = models(turns)
    policy.call("build")
    log.take()
    for _ in range(2):
        turns.publish()
        turns.generate()
        policy.call("logprobs")
        critic.call("values")
        policy.call("train")
        critic.call("train")
        assert log.take() == [
            "engine.wake weights",
            "policy.offload",
            "critic.offload",
            "engine.wake kv_cache",
            "engine.sleep",
            "policy.reload",
            "critic.reload",
            "policy.logprobs",
            "critic.values",
            "policy.train",
            "critic.train",
        ]


def test_publishing_puts_a_waking_engine_to_sleep_first(log, turns):
    log.take()
    turns.publish()
    assert log.take() == ["engine.sleep", "policy.reload", "critic.reload", "engine.wake weights"]


def test_weights_from_a_folder_need_no_models(log, turns):
    models(turns)[0].call("save")
    log.take()
    turns.load()
    turns.generate()
    turns.generate()
    assert log.take() == ["policy.offload", "critic.offload", "engine.wake weights", "engine.wake kv_cache"]


def test_an_engine_takes_its_turn_before_it_is_called(log, turns, monkeypatch):
    class Told:
        def __getattr__(self, method: str) -> Any:
            return type("Method", (), {"remote": lambda *_: log.append(method)})

    engine = SharingRollout([Told()], 60.0, turns)  # type: ignore[list-item]
    models(turns)[0].call("train")
    log.take()
    engine.load(Path("model"), 3)
    assert log.take()[-1] == "load"
    models(turns)[0].call("train")
    log.take()
    engine.generate([], Sampling(1), [])
    assert log.take()[:3] == ["policy.offload", "critic.offload", "engine.wake weights"]


def test_what_changing_hands_costs_is_counted(turns):
    before = turns.seconds
    models(turns)[0].call("train")
    assert turns.seconds > before
