"""Which samples stay on disk: a bounded number, spread over the run, whatever was interrupted."""

from itertools import pairwise

import pytest

from rlhf.recipe.online_schema import SampleFiles
from rlhf.stages.samples import forget_samples, is_kept, write_samples

STEPS = 300


def kept(newest, files):
    return [step for step in range(1, newest + 1) if is_kept(step, newest, files)]


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 40])
def test_never_more_than_keep_stay_and_what_stays_was_never_removed_before(keep, every):
    files = SampleFiles(every=every, keep=keep)
    before: set[int] = set()
    for newest in range(1, STEPS):
        now = kept(newest, files)
        assert len(now) <= keep
        written = newest == 1 or newest % every == 0
        assert set(now) <= before | ({newest} if written else set())
        assert (newest in now) == (written and (newest == 1 or newest % every == 0))
        before = set(now)
    assert (1 in before) == (keep > 1)
    recent = [step for step in range(STEPS - 1, 0, -1) if step % every == 0][: max(1, keep // 2)]
    assert set(recent) <= before


def test_those_between_are_spread_over_the_run():
    now = kept(1000, SampleFiles(keep=40))
    assert now[0] == 1
    assert now[-20:] == list(range(981, 1001))
    gaps = {after - before for before, after in pairwise(now[1:-20])}
    assert gaps == {64}
    assert len(now) > 30


def test_null_keeps_all_and_every_leaves_out():
    assert kept(9, SampleFiles(keep=None)) == list(range(1, 10))
    assert kept(9, SampleFiles(keep=None, every=4)) == [1, 4, 8]


def test_a_run_that_made_steps_again_ends_with_the_files_of_one_that_did_not(tmp_path):
    files = SampleFiles(keep=6)

    def make(folder, first, last):
        forget_samples(folder, first - 1, files)
        for step in range(first, last + 1):
            write_samples(folder, step, [], [])
            forget_samples(folder, step, files)

    make(tmp_path / "through", 1, 90)
    make(tmp_path / "again", 1, 47)
    make(tmp_path / "again", 31, 60)
    make(tmp_path / "again", 60, 90)
    names = [sorted(file.name for file in (tmp_path / folder).iterdir()) for folder in ("through", "again")]
    assert names[0] == names[1]
    assert len(names[0]) <= 6


def test_files_of_steps_that_will_be_made_again_are_removed_and_others_left_alone(tmp_path):
    for name in ("step-00001.jsonl", "step-00007.jsonl", "step-7.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}")
    forget_samples(tmp_path, 3, SampleFiles())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "step-00001.jsonl", "step-7.jsonl"]
