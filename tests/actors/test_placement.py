"""Reserving resources: the impossible is refused at once, waiting is visible and ends, the possible is granted."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from actors import placement
from actors.placement import reserve, wait_for_room
from rlhf.errors import ResourceError
from rlhf.recipe.placement import Bundle, Process

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

Reserve = list[PlacementGroup]


def bundles_of(amounts: dict[str, dict[str, float]]) -> list[Bundle]:
    """One process a bundle, by role."""
    return [
        Bundle((Process(role, 0, amount.get("CPU", 0), amount.get("GPU", 0)),))  # type: ignore[arg-type]
        for role, amount in amounts.items()
    ]


def await_free(cpus: float) -> None:
    """Wait until Ray tells just this much of free CPU (it hears of a reservation a moment late)."""
    ends = time.monotonic() + 60
    while (free := ray.available_resources().get("CPU", 0)) != cpus:
        assert time.monotonic() < ends, f"{free} CPU free, not {cpus}"
        time.sleep(0.1)


@pytest.fixture
def held(local_ray: None) -> Iterator[Reserve]:
    """Groups to give back after the test; begins when all four slots of the test's Ray are free."""
    await_free(4)
    groups: Reserve = []
    yield groups
    for group in groups:
        remove_placement_group(group)


def refusal(bundles: dict[str, dict[str, float]], timeout_s: float = 30) -> tuple[str, float, list[str]]:
    """Return the message of the refusal, the seconds it took, and what was said meanwhile."""
    said: list[str] = []
    started = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        reserve(bundles_of(bundles), timeout_s, said.append)
    return str(caught.value), time.monotonic() - started, said


@pytest.mark.parametrize(
    ("bundles", "expected"),
    [
        ({"policy": {"CPU": 3}, "critic": {"CPU": 2.5}}, "the recipe needs 5.5 CPU, the cluster has 4 CPU"),
        ({"policy": {"CPU": 1, "GPU": 2}}, "the recipe needs 1 CPU, 2 GPU, the cluster has 4 CPU, 0 GPU"),
    ],
)
def test_the_impossible_is_refused_at_once(held, bundles, expected):
    message, seconds, said = refusal(bundles)
    assert (message, said) == (expected, [])
    assert seconds < 30  # and does not wait for room


def test_a_process_without_any_resource_is_refused_by_name(held):
    message, _, _ = refusal({"policy": {"CPU": 1}, "critic": {"CPU": 0}})
    assert message == "the process critic-0 asks for no CPU and no GPU; give its role some, say cpus: 0.1"


def test_the_possible_is_granted_in_the_order_of_the_bundles(held):
    said: list[str] = []
    bundles = {"policy": {"CPU": 1.0}, "critic": {"CPU": 0.5}, "rollout": {"CPU": 2.0}}
    group = reserve(bundles_of(bundles), 60, said.append)
    held.append(group)
    assert group.bundle_specs == list(bundles.values())
    assert placement_group_table(group)["state"] == "CREATED"
    await_free(0.5)


def test_waiting_is_said_and_ends_at_the_timeout(held, monkeypatch):
    monkeypatch.setattr(placement, "POLL_S", 1.0)
    held.append(reserve(bundles_of({"other": {"CPU": 3.0}}), 60, lambda _: None))
    message, seconds, said = refusal({"policy": {"CPU": 1.0}, "critic": {"CPU": 1.0}}, timeout_s=3)
    assert re.fullmatch(
        r"no room for the roles after \d s: needed 2 CPU, free 1 CPU;"
        r" end what holds them, or raise ray\.placement_timeout_s",
        message,
    )
    assert seconds >= 3
    assert 1 <= len(said) <= 3
    assert re.fullmatch(r"waiting for the cluster: needed 2 CPU, free 1 CPU \(\d s of 3 s\)", said[0])


def test_a_reservation_that_is_gone_is_no_reason_to_wait(held):
    bundles = bundles_of({"other": {"CPU": 1.0}})
    group = reserve(bundles, 60, lambda _: None)
    remove_placement_group(group)
    with pytest.raises(ResourceError, match="Ray has dropped what was reserved for this run"):
        wait_for_room(group, bundles, 60, lambda _: None)


def test_what_timed_out_is_not_reserved_later(held):
    held.append(reserve(bundles_of({"other": {"CPU": 3.0}}), 60, lambda _: None))
    refusal({"policy": {"CPU": 2.0}}, timeout_s=1)
    remove_placement_group(held.pop())
    whole = reserve(bundles_of({"all": {"CPU": 4.0}}), 60, lambda _: None)
    held.append(whole)
    assert placement_group_table(whole)["state"] == "CREATED"


def test_waiting_ends_when_room_is_made(held, monkeypatch):
    monkeypatch.setattr(placement, "POLL_S", 1.0)
    other = reserve(bundles_of({"other": {"CPU": 3.0}}), 60, lambda _: None)
    said: list[str] = []

    def make_room(message: str) -> None:
        if not said:
            remove_placement_group(other)
        said.append(message)

    held.append(reserve(bundles_of({"policy": {"CPU": 2.0}}), 60, make_room))
    assert said


EIGHT_GPUS = {"CPU": 32.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("bundles", "nodes", "expected"),
    [
        (
            [{"CPU": 4, "GPU": 8}, {"CPU": 4, "GPU": 8}],
            [EIGHT_GPUS, {"CPU": 64.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 4.0}],
            "2 times 4 CPU, 8 GPU on one machine (for policy-0) are needed, but the cluster's machines have "
            "32 CPU, 8 GPU, 64 CPU, 4 GPU: room for 1",
        ),
        (
            [{"CPU": 1, "GPU": 4}],
            [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}],
            "1 times 1 CPU, 4 GPU on one machine (for policy-0) are needed, but the cluster's machines have "
            "8 CPU, 2 GPU: room for 0",
        ),
    ],
)
def test_machines_too_small_for_a_bundle_are_refused(bundles, nodes, expected):
    wanted = [Bundle((Process("policy", n, b["CPU"], b["GPU"]),)) for n, b in enumerate(bundles)]
    with pytest.raises(ResourceError) as caught:
        placement.check_possible(wanted, nodes)
    assert str(caught.value) == expected


def test_what_fits_somehow_is_not_refused():
    wanted = [Bundle((Process("policy", n, 1, gpus),)) for n, gpus in enumerate((4, 2, 2, 4, 1, 1, 1, 1))]
    placement.check_possible(wanted, [EIGHT_GPUS, EIGHT_GPUS])
    placement.check_possible([Bundle((Process("critic", n, 0.1, 0.3333),)) for n in range(3)], [{"CPU": 1, "GPU": 1}])
