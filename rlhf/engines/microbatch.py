"""Cutting a batch into passes that fit in memory, alike rows together, shared among the ranks of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlhf.pulse import PULSE
from rlhf.types import Rows

B = TypeVar("B", bound=Rows)


@dataclass(frozen=True)
class Unit:
    """Rows that go through the model together; `tokens` of them all when laid flat, `longest` is the longest row's."""

    rows: list[int]
    tokens: int
    longest: int


def rank_passes(batch: Rows, max_tokens: int, flat: bool, ranks: int = 1) -> list[list[list[int]]]:
    """Return the passes of each rank, each a list of rows, so that all ranks have equally many.

    A pass has at most `max_tokens` tokens, or one row; padding counts, unless rows are laid flat, and then rows with
    the same prompt stay together as far as they fit, and the prompt counts once. Longest first, so little is padding
    and the ranks' work is alike; every row is in exactly one pass. A rank that runs out of rows gets empty passes.
    """
    made = units(batch, max_tokens, flat)
    shares = [_packed(made[rank::ranks], max_tokens, flat) for rank in range(ranks)]
    passes = max(len(share) for share in shares)
    return [share + [[] for _ in range(passes - len(share))] for share in shares]


def micro_batches(batch: B, max_tokens: int, flat: bool) -> Iterator[tuple[list[int], B]]:
    """Yield (rows, those rows with shared padding dropped); each pass counts as progress."""
    for rows in rank_passes(batch, max_tokens, flat)[0]:
        yield rows, batch.select(rows).trim()
        PULSE.beat()


def units(batch: Rows, max_tokens: int, flat: bool) -> list[Unit]:
    """Return what must not be torn apart, longest first: single rows or, laid flat, the rows that share a prompt."""
    if not flat:
        made = [Unit([row], length, length) for row, length in enumerate(batch.lengths().tolist())]
    else:
        made = [unit for family in _families(batch) for unit in family.cut(max_tokens)]
    return sorted(made, key=lambda unit: -unit.longest)


@dataclass(frozen=True)
class _Family:
    """Rows whose first `shared` tokens are equal, with the tokens that each has beside them."""

    rows: list[int]
    shared: int
    own: list[int]

    def cut(self, max_tokens: int) -> Iterator[Unit]:
        """Yield it in units of at most `max_tokens`, or one row, longest first."""
        order = sorted(range(len(self.rows)), key=lambda i: -self.own[i])
        while order:
            taken = [order.pop(0)]
            tokens = longest = self.shared + self.own[taken[0]]
            while order and tokens + self.own[order[0]] <= max_tokens:
                tokens += self.own[order[0]]
                taken.append(order.pop(0))
            yield Unit([self.rows[i] for i in taken], tokens, longest)


def _families(batch: Rows) -> Iterator[_Family]:
    prompts, lengths = batch.prompt_lengths().tolist(), batch.flat_lengths().tolist()
    for rows in batch.families():
        shared = prompts[rows[0]]
        yield _Family(rows, shared, [lengths[row] - shared for row in rows])


def _packed(made: Sequence[Unit], max_tokens: int, flat: bool) -> list[list[int]]:
    passes: list[list[int]] = []
    tokens = widest = 0
    for unit in made:
        grown = tokens + unit.tokens if flat else (len(passes[-1]) + 1 if passes else 1) * widest
        if passes and grown <= max_tokens:
            passes[-1] += unit.rows
            tokens += unit.tokens
        else:
            passes.append(list(unit.rows))
            tokens, widest = unit.tokens, unit.longest
    return passes
