"""What a cluster's devices are fast at: by the names of its GPUs, and as its machines measure their CPUs."""

from __future__ import annotations

import pytest

from actors.devices import ClusterDevices, cpu_speed, gpu_speed
from rlhf.backend import devices
from rlhf.recipe.dtype import Here
from rlhf.recipe.products import Products
from rlhf.recipe.schema import Recipe

FAST, SLOW = Products(2e11, 1e11, True), Products(2e9, 1e11, False)


def node(*kinds: str) -> dict:
    return {
        "NodeID": "0",
        "Alive": True,
        "Resources": {"CPU": 8.0, **{f"accelerator_type:{kind}": 1 for kind in kinds}},
    }


@pytest.mark.parametrize(
    ("nodes", "dtype"),
    [
        ([node("H100")], "bfloat16"),
        ([node(), node("A100")], "bfloat16"),
        ([node("H100"), node("T4")], "float32"),
        ([node("V100")], "float32"),
        ([node("A-GPU-OF-TOMORROW")], "bfloat16"),
        ([node()], "bfloat16"),
    ],
)
def test_one_old_gpu_is_enough_for_float32(nodes, dtype):
    assert gpu_speed(nodes).dtype == dtype


def test_the_slowest_cpu_decides():
    assert cpu_speed([FAST, FAST]).dtype == "bfloat16"
    assert cpu_speed([FAST, SLOW]).dtype == "float32"
    assert cpu_speed([FAST, SLOW]).slower == 50
    assert cpu_speed([]) is None


@pytest.mark.parametrize(
    ("backend", "ray", "kind"),
    [
        ("local", {}, Here),
        ("ray", {}, Here),
        ("ray", {"address": "auto"}, ClusterDevices),
        ("local", {"address": "auto"}, Here),
    ],
)
def test_only_a_run_on_a_cluster_asks_the_cluster(backend, ray, kind):
    stage = {"name": "sft", "kind": "sft", "data": {"path": "x.jsonl"}}
    made = Recipe.model_validate(
        {"name": "t", "model": {"path": "m"}, "backend": backend, "ray": ray, "stages": [stage]}
    )
    assert isinstance(devices(made, 0), kind)
