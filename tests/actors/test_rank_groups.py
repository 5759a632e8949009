"""The pipeline on several ranks through Ray: the same numbers as on one, and an engine that takes turns with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_launch import TRAINED, Watched, rows, start, summary

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TOLERANCE = {"sft": 1e-6, "rm": 2e-5, "ppo": 5e-5, "dpo": 1e-5}
"""In float32, of weights; sums of two ranks round otherwise than those of one, and every step carries it on."""


@dataclass(frozen=True)
class Both:
    several: Watched
    one: Path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """ZeRO 3 for the policy, 2 for the critic, 1 for the reward model, two replicas; and one process."""
    one = start(tmp_path_factory.mktemp("one"), "ranks.yaml", "--local")
    one.finish()
    several = start(tmp_path_factory.mktemp("several"), "ranks.yaml")
    several.finish()
    assert one.run.returncode == 0, one.stderr
    assert several.run.returncode == 0, several.stderr
    return Both(several, one.folder)


@pytest.mark.parametrize("stage", TRAINED)
def test_weights_and_metrics_are_those_of_one_rank(both: Both, stage: str) -> None:
    found, expected = (
        load_file(folder / "stages" / stage / "model" / "model.safetensors")
        for folder in (both.several.folder, both.one)
    )
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=TOLERANCE[stage])
    for step, wanted in zip(rows(both.several.folder, stage), rows(both.one, stage), strict=True):
        assert step.keys() == wanted.keys()
        for name, value in wanted.items():
            counted = name.endswith("fraction")  # one token beyond the edge more or less
            assert step[name] == pytest.approx(value, rel=2e-3, abs=2e-3 if counted else 1e-4), name


def test_pairs_and_responses_are_the_same(both: Both) -> None:
    pairs = "stages/pairs/pairs.jsonl"
    assert (both.several.folder / pairs).read_bytes() == (both.one / pairs).read_bytes()
    for step in range(1, 7):
        assert responses(both.several.folder, step) == responses(both.one, step)


def responses(folder: Path, step: int) -> list[str]:
    lines = (folder / "stages" / "ppo" / "samples" / f"step-{step:05}.jsonl").read_text().splitlines()
    return [json.loads(line)["response"] for line in lines]


def test_every_rank_and_replica_is_a_process_and_none_is_left(both: Both) -> None:
    assert len(both.several.pids("LearnerActor")) == 6
    assert len(both.several.pids("RolloutActor")) == 2
    assert both.several.left() == set()
    assert summary(both.several.folder, "ppo")["weight_version"] == 6
