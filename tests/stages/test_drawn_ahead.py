"""Rollouts in a state: every bit comes back, and the file grows with the tokens."""

import json
from dataclasses import fields

import pytest

from rlhf.roles import Ready
from rlhf.stages.drawn_ahead import AHEAD, DrawnAhead, columns_of
from rlhf.stages.online_draw import Drawing
from rlhf.types import Prompt, Rollout

PROMPTS = [Prompt("a", (1, 2), "one"), Prompt("b", (3,), "two", {"n": 1})]
THIRD = 0.3333333432674408  # of 32 bits
ROLLOUTS = [
    Rollout(PROMPTS[0], (7, 151_000), (-THIRD, -1e-30), "caf\u00e9 \U0001f600", "stop", 4, 2**32 - 1),
    Rollout(PROMPTS[0], (), (), "", "length", 4, 0),
    Rollout(PROMPTS[1], (9,), (0.0,), "\ud800\x00\n", "length", 5, 17),
    Rollout(PROMPTS[1], (9, 9, 9), (-1.5, -0.25, float("-inf")), "x" * 1000, "stop", 5, 18),
]


def kept(rollouts, folder):
    ahead = DrawnAhead()
    ahead.drawing = Drawing(3, Ready(rollouts)) if rollouts else None
    size = ahead.state_bytes().result()
    ahead.save_state(folder).result()
    return size


def taken_up(folder, earlier=()):
    ahead = DrawnAhead()
    ahead.load_state(folder).result()
    return ahead.taken_up(3, PROMPTS, earlier)


@pytest.mark.parametrize("more", [(), (-1 / 3,)])
def test_every_bit_comes_back(tmp_path, more):
    rollouts = [*ROLLOUTS[:3], Rollout(PROMPTS[1], (8,) * len(more), more, "", "stop", 5, 19)] if more else ROLLOUTS
    kept(rollouts, tmp_path)
    drawing = taken_up(tmp_path)
    assert drawing.step == 3
    assert drawing.rollouts == rollouts
    assert [repr(rollout) for rollout in drawing.rollouts] == [repr(rollout) for rollout in rollouts]


def test_nothing_drawn_ahead_comes_back_as_nothing(tmp_path):
    kept([], tmp_path)
    assert taken_up(tmp_path) is None
    (tmp_path / AHEAD).unlink()
    assert taken_up(tmp_path) is None


def test_logprobs_take_the_bits_they_have():
    assert columns_of(ROLLOUTS[3:])["logprobs"].dtype == "float32"
    assert columns_of([Rollout(PROMPTS[0], (1,), (-1 / 3,), "", "stop", 0, 0)])["logprobs"].dtype == "float64"


def test_rows_that_an_earlier_version_carried_in_its_manifest_are_taken_up(tmp_path):
    names = [column.name for column in fields(Rollout) if column.name != "prompt"]
    rollouts = [*ROLLOUTS[:3], Rollout(PROMPTS[1], (9, 9), (-1.5, -1 / 3), "x", "stop", 5, 18)]
    rows = json.loads(json.dumps([{name: getattr(rollout, name) for name in names} for rollout in rollouts]))
    assert taken_up(tmp_path, rows).rollouts == rollouts


def test_the_file_holds_8_bytes_a_token_and_no_more_than_was_said(tmp_path):
    sizes = []
    for length in (1000, 9000):
        rollout = Rollout(PROMPTS[0], (7,) * length, (-0.5,) * length, "", "stop", 0, 0)
        said = kept([rollout] * 4, tmp_path)
        sizes.append((tmp_path / AHEAD).stat().st_size)
        assert sizes[-1] <= said
    assert sizes[1] - sizes[0] == pytest.approx(4 * 8000 * 8, abs=100)
