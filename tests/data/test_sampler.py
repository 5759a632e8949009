"""Properties of the order of training."""

from collections import Counter
from itertools import chain

import pytest

from rlhf.data.sampler import batches, permutation, prompt_batch, steps
from rlhf.errors import DataError


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    made = list(batches(rows=10, batch_size=4, epochs=3, seed=5))
    assert [len(batch) for batch in made] == [4, 4, 2] * 3
    epochs = [list(chain.from_iterable(made[start : start + 3])) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_seed_and_epoch_alone():
    assert list(batches(10, 4, 2, seed=5)) == list(batches(10, 4, 2, seed=5))
    assert list(batches(10, 4, 2, seed=5)) == list(batches(10, 4, 3, seed=5))[:6]
    assert list(batches(10, 4, 2, seed=5)) != list(batches(10, 4, 2, seed=6))
    assert (
        list(chain.from_iterable(batches(10, 3, 1, seed=5)))
        == list(chain.from_iterable(batches(10, 7, 1, seed=5)))
        == permutation(10, 5, 0)
    )


def test_every_position_is_reached_by_every_row():
    seen = Counter(permutation(4, seed=0, epoch=epoch)[0] for epoch in range(400))
    assert sorted(seen) == [0, 1, 2, 3]
    assert min(seen.values()) > 70


@pytest.mark.parametrize(("rows", "size", "epochs"), [(10, 4, 3), (8, 4, 2), (3, 5, 2), (1, 1, 1)])
def test_steps_counts_batches(rows, size, epochs):
    assert steps(rows, size, epochs) == len(list(batches(rows, size, epochs, seed=0)))


@pytest.mark.parametrize("groups", [1, 2, 3, 7])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("groups_a_batch", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_whole_and_in_order_where_batches_hold_whole_ones(groups, group, groups_a_batch, seed):
    rows, size = groups * group, groups_a_batch * group
    made = list(batches(rows, size, epochs=2, seed=seed, group=group))
    assert made == list(batches(rows, size, epochs=2, seed=seed, group=group))
    assert len(made) == steps(rows, size, epochs=2)
    for epoch in (made[: len(made) // 2], made[len(made) // 2 :]):
        assert sorted(chain.from_iterable(epoch)) == list(range(rows))
        assert all(len(batch) == size for batch in epoch[:-1])
        for batch in epoch:
            members = [batch[start : start + group] for start in range(0, len(batch), group)]
            assert all(one[0] % group == 0 and one == list(range(one[0], one[0] + group)) for one in members)


def test_the_order_of_groups_is_that_of_single_rows():
    assert [batch[::4] for batch in batches(40, 8, 2, seed=5, group=4)] == [
        [4 * row for row in batch] for batch in batches(10, 2, 2, seed=5)
    ]


@pytest.mark.parametrize(("rows", "size", "group"), [(12, 4, 3), (12, 2, 4), (13, 8, 4)])
def test_single_rows_are_shuffled_where_batches_or_rows_would_cut_a_group(rows, size, group):
    assert list(batches(rows, size, 2, seed=5, group=group)) == list(batches(rows, size, 2, seed=5))


def test_rl_steps_walk_through_an_epoch_without_repeats():
    per_epoch = 3
    walked = [prompt_batch(rows=10, size=3, step=step, seed=1) for step in range(4 * per_epoch)]
    for start in range(0, len(walked), per_epoch):
        epoch = list(chain.from_iterable(walked[start : start + per_epoch]))
        assert len(set(epoch)) == 9
    assert all(len(set(batch)) == 3 for batch in walked)
    assert walked[0] + walked[1] + walked[2] != walked[3] + walked[4] + walked[5]
    assert {row for batch in walked for row in batch} == set(range(10))


def test_a_step_asks_for_its_rows_without_the_steps_before():
    assert prompt_batch(10, 3, step=7, seed=1) == [prompt_batch(10, 3, step, seed=1) for step in range(8)][7]
    assert prompt_batch(10, 3, step=7, seed=1) != prompt_batch(10, 3, step=7, seed=2)


def test_all_rows_in_one_step_are_a_permutation_each_time():
    assert sorted(prompt_batch(5, 5, step=9, seed=0)) == [0, 1, 2, 3, 4]


def test_a_step_cannot_take_more_prompts_than_there_are():
    with pytest.raises(DataError) as error:
        prompt_batch(rows=3, size=4, step=0, seed=0)
    assert str(error.value) == ("a step takes 4 prompts but there are only 3: lower prompts_per_step or add prompts")
