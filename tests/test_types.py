"""The shapes that travel: rows selected, padding cut, batches stacked, metrics added up exactly."""

import math
import random
from dataclasses import fields, replace

import pytest
import torch

from rlhf.types import Experience, LabelledBatch, Metrics, PreferenceBatch, Rows, TokenBatch, ValueBatch


def token_batch(*lengths: int, width: int, first: int = 10) -> TokenBatch:
    """Rows of counting tokens; of each row the last token is the response, with logprob -length."""
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    attention, response = torch.zeros(2, len(lengths), width, dtype=torch.bool)
    logprobs = torch.zeros(len(lengths), width)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.arange(first * (row + 1), first * (row + 1) + length)
        attention[row, :length] = True
        response[row, length - 1] = True
        logprobs[row, length - 1] = -length
    return TokenBatch(tokens, attention, response, logprobs)


def experience() -> Experience:
    columns = {name: torch.arange(15.0).view(3, 5) + 100 * place for place, name in enumerate(PER_TOKEN)}
    return Experience(batch=token_batch(3, 4, 2, width=5), scores=torch.tensor([0.5, 1.5, 2.5]), **columns)


def value_batch() -> ValueBatch:
    columns = {name: torch.arange(15.0).view(3, 5) + 100 * place for place, name in enumerate(("values", "returns"))}
    return ValueBatch(batch=token_batch(3, 4, 2, width=5), **columns)


PER_TOKEN = ("kl", "old_logprobs", "ref_logprobs", "advantages")


def pairs() -> PreferenceBatch:
    return PreferenceBatch(
        chosen=token_batch(3, 2, width=6),
        rejected=token_batch(4, 1, width=5, first=50),
        margins=torch.tensor([1.0, 2.0]),
        chosen_ref_logprobs=torch.tensor([-1.0, -2.0]),
        rejected_ref_logprobs=torch.tensor([-3.0, -4.0]),
    )


def labelled() -> LabelledBatch:
    return LabelledBatch(
        batch=token_batch(3, 4, width=6),
        desirable=torch.tensor([True, False]),
        ref_logprobs=torch.tensor([-1.0, -2.0]),
        kl=torch.tensor([0.5, 0.5]),
    )


def test_labelled_rows_keep_their_labels_and_trim_their_tokens():
    row = labelled().select([1]).trim()
    assert row.batch.tokens.tolist() == [[20, 21, 22, 23]]
    assert (row.desirable.tolist(), row.ref_logprobs.tolist(), row.kl.tolist()) == ([False], [-2.0], [0.5])
    assert labelled().trim().batch.width == 4
    assert labelled().lengths().tolist() == [3, 4]


def test_tokens_are_counted_without_padding_and_on_both_sides_of_a_pair():
    assert token_batch(3, 4, 2, width=5).token_count() == 9
    assert labelled().token_count() == 7
    assert pairs().token_count() == 3 + 2 + 4 + 1


def test_select_takes_rows_in_the_given_order_and_again():
    picked = token_batch(3, 4, 2, width=5).select([2, 0, 2])
    assert picked.tokens.tolist() == [[30, 31, 0, 0, 0], [10, 11, 12, 0, 0], [30, 31, 0, 0, 0]]
    assert picked.attention_mask.sum(dim=1).tolist() == [2, 3, 2]
    assert picked.response_mask.nonzero().tolist() == [[0, 1], [1, 2], [2, 1]]
    assert picked.rollout_logprobs[:, 1:3].tolist() == [[-2, 0], [0, -3], [-2, 0]]
    assert len(picked) == 3


def test_select_reaches_nested_batches_and_every_column():
    picked = experience().select(range(1, 3))
    assert picked.batch.tokens[:, 0].tolist() == [20, 30]
    assert picked.scores.tolist() == [1.5, 2.5]
    for place, name in enumerate(PER_TOKEN):
        assert getattr(picked, name).tolist() == [[100 * place + 5 * row + t for t in range(5)] for row in (1, 2)]
    assert pairs().select([1]).rejected.tokens.tolist() == [[100, 0, 0, 0, 0]]


def test_narrow_cuts_columns_of_tokens_and_leaves_rows_alone():
    cut = experience().narrow(2)
    assert cut.batch.tokens.tolist() == [[10, 11], [20, 21], [30, 31]]
    assert cut.scores.tolist() == [0.5, 1.5, 2.5]
    assert all(getattr(cut, name).shape == (3, 2) for name in PER_TOKEN)
    assert cut.advantages[2].tolist() == [310, 311]


def test_trim_drops_only_what_is_padding_in_every_row():
    trimmed = experience().trim()
    assert trimmed.batch.width == 4
    assert trimmed.batch.tokens[1].tolist() == [20, 21, 22, 23]
    assert trimmed.kl.shape == (3, 4)
    assert trimmed.lengths().tolist() == [3, 4, 2]


def test_a_critics_batch_is_cut_and_selected_like_its_policys():
    part = value_batch().select([2, 0]).trim()
    assert part.batch.tokens.tolist() == [[30, 31, 0], [10, 11, 12]]
    assert part.returns.tolist() == [[110, 111, 112], [100, 101, 102]]
    assert (part.lengths().tolist(), part.token_count()) == ([2, 3], 5)


def test_trim_of_pairs_cuts_each_side_to_its_own_longest():
    trimmed = pairs().trim()
    assert (trimmed.chosen.width, trimmed.rejected.width) == (3, 4)
    assert trimmed.margins.tolist() == [1.0, 2.0]


def test_the_cost_of_a_pair_is_its_longer_side_twice():
    assert pairs().lengths().tolist() == [8, 4]


@pytest.mark.parametrize(
    "rows",
    [token_batch(3, 4, width=5), experience(), value_batch(), pairs()],
    ids=["tokens", "policy", "critic", "pairs"],
)
def test_to_moves_every_tensor(rows):
    def devices(value: Rows) -> set[str]:
        found: set[str] = set()
        for item in fields(value):  # type: ignore[arg-type]
            part = getattr(value, item.name)
            found |= devices(part) if isinstance(part, Rows) else {part.device.type}
        return found

    assert devices(rows) == {"cpu"}
    moved = rows.to(torch.device("meta"))
    assert type(moved) is type(rows)
    assert devices(moved) == {"meta"}
    assert devices(rows) == {"cpu"}


def test_stack_pads_every_column_to_the_widest_and_keeps_the_types():
    narrow, wide = token_batch(2, 3, width=3), token_batch(5, width=6, first=50)
    stacked = TokenBatch.stack([narrow, wide])
    assert stacked.tokens.tolist() == [[10, 11, 0, 0, 0, 0], [20, 21, 22, 0, 0, 0], [50, 51, 52, 53, 54, 0]]
    assert stacked.lengths().tolist() == [2, 3, 5]
    assert stacked.response_mask.nonzero().tolist() == [[0, 1], [1, 2], [2, 4]]
    assert stacked.rollout_logprobs.sum(dim=1).tolist() == [-2, -3, -5]
    for item in fields(stacked):
        assert getattr(stacked, item.name).dtype == getattr(narrow, item.name).dtype
    for rows, part in (([0, 1], narrow), ([2], wide)):
        again = stacked.select(rows).trim()
        for item in fields(again):
            assert torch.equal(getattr(again, item.name), getattr(part.trim(), item.name))


def test_batches_do_not_change():
    batch = token_batch(2, width=3)
    with pytest.raises(AttributeError):
        batch.tokens = batch.tokens + 1  # type: ignore[misc]
    assert replace(batch, tokens=batch.tokens + 1).tokens[0, 0] == 11


def test_metrics_are_means_over_what_was_counted():
    metrics = Metrics.of(4, loss=torch.tensor(6.0), accuracy=3)
    assert dict(metrics) == {"loss": 1.5, "accuracy": 0.75}
    assert (len(metrics), list(metrics), "loss" in metrics) == (2, ["loss", "accuracy"], True)
    assert math.isnan(Metrics.of(0, loss=0.0)["loss"])
    with pytest.raises(KeyError):
        metrics["reward"]


def test_merging_weighs_by_count_and_not_by_batch():
    merged = Metrics.of(1, loss=10.0).merge(Metrics.of(9, loss=0.0)).merge(Metrics.of(2, kl=1.0))
    assert dict(merged) == {"loss": 1.0, "kl": 0.5}
    assert merged.sums == {"loss": (10.0, 10.0), "kl": (1.0, 2.0)}


def test_merging_leaves_both_sides_as_they_were():
    first, second = Metrics.of(1, loss=1.0), Metrics.of(1, loss=2.0)
    first.merge(second)
    assert (first["loss"], second["loss"]) == (1.0, 2.0)


def test_any_cut_into_parts_gives_exactly_the_whole():
    """Sums of multiples of 1/8 are exact in floating point, so the merged mean must be, too."""
    rng = random.Random(0)
    values = [rng.randrange(-800, 800) / 8 for _ in range(64)]
    whole = Metrics.of(len(values), loss=sum(values))
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, 64), 5))
        merged = Metrics()
        for start, stop in zip([0, *cuts], [*cuts, 64], strict=True):
            merged = merged.merge(Metrics.of(stop - start, loss=sum(values[start:stop])))
        assert merged.sums == whole.sums
        assert merged["loss"] == whole["loss"]
