"""Annotation in rounds: the engine has work while a round is judged, and an end at any moment loses one at most."""

import json
import os
import signal
import tracemalloc
from pathlib import Path

import pytest
from annotate_made import FILES, Bench, Flushes, Killed

from rlhf import checkpoint
from rlhf.checkpoint import states
from rlhf.data.best import read_best, write_best
from rlhf.data.pairs import read_pairs, write_pairs
from rlhf.errors import DataError, TrainingError
from rlhf.interrupts import Interrupted, Interrupts
from rlhf.recipe.role_schema import Roles, RolloutRole
from rlhf.stages import annotate
from rlhf.stages.annotate import prompts_per_round
from rlhf.stages.appended import COMMITTED

ROUNDS = [("p0", "p1"), ("p2", "p3"), ("p4", "p5"), ("p6", "p7"), ("p8",)]


@pytest.fixture
def bench(tmp_path, tiny_folder):
    return Bench(tmp_path, tiny_folder)


def test_a_round_is_what_the_engine_generates_at_once_and_as_much_again():
    assert prompts_per_round(RolloutRole(max_sequences=64), 4) == 32
    assert prompts_per_round(RolloutRole(max_sequences=64, replicas=8), 4) == 256
    assert prompts_per_round(RolloutRole(max_sequences=3), 4) == 2
    assert prompts_per_round(RolloutRole(max_sequences=1), 8) == 1


def test_the_next_round_is_drawn_while_one_is_judged_and_no_more_wait(bench):
    bench.run("out")
    wanted = [("draw", ROUNDS[0])]
    for present, following in zip(ROUNDS, [*ROUNDS[1:], None], strict=True):
        wanted += [("draw", following)] if following else []
        wanted += [("judge", present)]
    assert bench.events == wanted


def test_an_engine_that_takes_turns_draws_nothing_while_models_work(bench):
    bench.roles = Roles(rollout=RolloutRole(max_sequences=2, share="policy"))
    bench.run("out")
    assert bench.events == [(what, prompts) for prompts in ROUNDS for what in ("draw", "judge")]


def test_the_files_hold_what_a_writer_of_whole_lists_would_write(bench):
    summary = bench.run("out")
    pairs, best = (read(bench.folder / "out" / name) for read, name in zip((read_pairs, read_best), FILES, strict=True))
    write_pairs(bench.folder / annotate.PAIRS, pairs)
    write_best(bench.folder / annotate.BEST, best)
    assert [(bench.folder / name).read_bytes() for name in FILES] == bench.files("out")
    assert summary == {
        "pairs": len(pairs),
        "heldout": sum(pair.heldout for pair in pairs),
        "flipped": sum(pair.flipped for pair in pairs) / len(pairs),
    }
    assert [pair.prompt_id for pair in pairs] == sorted(pair.prompt_id for pair in pairs)


def test_rounds_of_any_size_give_the_same_files(bench):
    bench.run("out")
    bench.roles = Roles(rollout=RolloutRole(max_sequences=64))
    bench.run("other")
    assert bench.files("other") == bench.files("out")


@pytest.mark.parametrize("moment", range(10))
def test_an_interrupt_at_any_moment_ends_after_the_round_and_loses_at_most_the_next(bench, moment):
    bench.run("through")
    bench.events.clear()

    def signalled(event):
        if len(bench.events) == moment + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    bench.during = signalled
    with Interrupts() as interrupts, pytest.raises(Interrupted) as stop:
        bench.run("out", interrupts)
    assert stop.value.exit_code == 143
    judged = sum(what == "judge" for what, _ in bench.events)
    assert str(stop.value) == f"after step {judged}, which is saved"
    bench.run("out")
    assert bench.files("out") == bench.files("through")
    assert sum(what == "judge" for what, _ in bench.events) == len(ROUNDS)
    assert len(bench.drawn()) - 9 <= 2


def kills():
    return [(after, power) for after in (False, True) for power in (False, True)]


@pytest.mark.parametrize(("after", "power"), kills())
def test_a_death_at_every_flush_costs_the_rounds_in_hand_and_no_row(tmp_path, tiny_folder, after, power):
    bench = Bench(tmp_path, tiny_folder, prompts=5)
    flushes = Flushes()
    with flushes.counted():
        bench.run("through")
    assert flushes.count > 3 * 3
    for fatal in range(1, flushes.count + 1):
        name = f"out-{fatal}"
        bench.events.clear()
        dying = Flushes(fatal, after)
        with dying.counted(), pytest.raises(Killed):
            bench.run(name)
        if power:
            dying.lose_power(*(tmp_path / name / file for file in FILES))
        bench.run(name)
        assert bench.files(name) == bench.files("through")
        assert sum(what == "judge" for what, _ in bench.events) <= 3 + 1
        assert len(bench.drawn()) <= 5 + 4


def test_a_state_stays_small_and_the_rows_are_nowhere_else(tmp_path, tiny_folder):
    sizes = []
    for prompts in (8, 80):
        folder = tmp_path / str(prompts)
        folder.mkdir()
        bench = Bench(folder, tiny_folder, prompts)
        bench.run("out")
        newest = states(folder / "out" / "state")[-1]
        sizes.append(sum(file.stat().st_size for file in newest.iterdir()))
        assert {file.name for file in newest.iterdir()} == {COMMITTED, "manifest.json"}
    assert sizes[1] - sizes[0] < 100


def test_memory_stays_flat_as_prompts_grow(tmp_path, tiny_folder):
    """Responses of 4,000 tokens; of 20 prompts and of 80 as much is held at once, beside the prompts themselves."""
    peaks = []
    for prompts in (20, 80):
        folder = tmp_path / str(prompts)
        folder.mkdir()
        bench = Bench(folder, tiny_folder, prompts)
        bench.filling = tuple(range(1000, 5000))
        tracemalloc.start()
        bench.run("out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (folder / "out" / annotate.PAIRS).stat().st_size > 20_000 * prompts
    assert peaks[1] < 1.2 * peaks[0]


def state_of_an_earlier_version(bench):
    """Interrupt a run after two rounds and give its state the files, as states had them."""
    bench.during = lambda event: os.kill(os.getpid(), signal.SIGINT) if event == ("judge", ROUNDS[1]) else None
    with Interrupts() as interrupts, pytest.raises(Interrupted):
        bench.run("out", interrupts)
    bench.during = lambda event: None
    return states(bench.folder / "out" / "state")[-1]


def test_a_state_that_holds_the_files_themselves_still_goes_on(bench, monkeypatch):
    bench.run("through")
    newest = state_of_an_earlier_version(bench)
    whole = bench.files("out")

    def fill(folder):
        for name, content in zip(FILES, whole, strict=True):
            (folder / name).write_bytes(content)
            (bench.folder / "out" / name).unlink()

    info = {**checkpoint.begun(newest.parent).info, "carried": {"skips": {}}}
    checkpoint.write(newest.parent, 2, "key", fill, info)
    monkeypatch.setattr(annotate, "EARLIER_ROUND", 2)
    bench.events.clear()
    summary = bench.run("out")
    assert bench.files("out") == bench.files("through")
    assert bench.drawn() == ["p4", "p5", "p6", "p7", "p8"]
    assert summary["pairs"] == len(bench.files("out")[0].splitlines())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-10], "has .* of its .* saved bytes"),
        (lambda content: b"", "has 0 of its .* saved bytes"),
        (lambda content: content.replace(b"p1", b"p7"), "was changed"),
        (None, "has 0 of its .* saved bytes"),
    ],
)
def test_a_file_that_lost_what_was_committed_is_named_with_a_remedy_and_left_alone(bench, name, damage, said):
    state_of_an_earlier_version(bench)
    path = bench.folder / "out" / name
    left = damage(path.read_bytes()) if damage else None
    path.unlink() if left is None else path.write_bytes(left)
    with pytest.raises(DataError, match=rf"{name}: {said} .*--restart pairs"):
        bench.run("out")
    assert (path.read_bytes() if path.exists() else None) == left


def test_rows_behind_the_state_are_made_again(bench):
    bench.run("through")
    state_of_an_earlier_version(bench)
    for name in FILES:
        with (bench.folder / "out" / name).open("ab") as file:
            file.write(b'{"half": "a ro')
    bench.run("out")
    assert bench.files("out") == bench.files("through")


def test_no_pair_to_train_on_is_said(tmp_path, tiny_folder):
    bench = Bench(tmp_path, tiny_folder, heldout_fraction=1.0)
    with pytest.raises(TrainingError, match="found no pair to train on in 9 prompts"):
        bench.run("out")


def test_the_counts_go_on_with_the_state(bench):
    through = bench.run("through")
    state_of_an_earlier_version(bench)
    assert bench.run("out") == through
    rows = [json.loads(line) for line in Path(bench.folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["pairs"] == through["pairs"]
