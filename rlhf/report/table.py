"""The comparison for the terminal: one table and one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.report.results import FEWEST_PROMPTS, Comparison, Interval, show

if TYPE_CHECKING:
    from rich.table import Table


def comparison_table(comparison: Comparison) -> Table:
    """Return one row per candidate, best gold first, each number with its interval."""
    from rich.table import Table
    from rich.text import Text

    level = f"{comparison.level:.0%}"
    table = Table(
        title="Comparison by gold reward",
        caption=Text(
            f"{comparison.prompts} prompts, {level} bootstrap intervals; win rate against {comparison.baseline}"
        ),
    )
    table.add_column("candidate")
    for heading in ("gold reward", "reward model", "KL to reference", "tokens", "win rate"):
        table.add_column(heading, justify="right")
    for item in sorted(comparison.candidates, key=lambda item: -item.gold):
        mark = " (baseline)" if item.name == comparison.baseline else ""
        cells = [
            _cell(item.gold, item.gold_ci),
            _cell(item.reward, item.reward_ci),
            _cell(item.kl, item.kl_ci),
            _cell(item.length, item.length_ci),
            percent(item.win_rate, item.win_rate_ci) if not mark else "-",
        ]
        table.add_row(Text(item.name + mark), *(Text(cell) for cell in cells))
    return table


def verdict(comparison: Comparison) -> str:
    """Say in a sentence who wins by gold: only one whose paired interval over every other excludes zero."""
    ranked = sorted(comparison.candidates, key=lambda item: -item.gold)
    best, others = ranked[0], ranked[1:]
    lead = f"{best.name} with gold reward {show(best.gold)} {best.gold_ci}"
    if not others:
        return f"No winner: there is nothing to compare {lead} with."
    if comparison.prompts < FEWEST_PROMPTS:
        return f"No clear winner: {comparison.prompts} prompt(s) are too few to tell. Highest is {lead}."
    gaps = [comparison.difference(best.name, item.name, "gold") for item in others]
    scale = f"{comparison.level:.0%} paired bootstrap over {comparison.prompts} prompts"
    if all(gap.clear for gap in gaps):
        leads = " and ".join(f"{gap} over {gap.baseline}" for gap in gaps)
        return f"{best.name} wins by gold reward, {show(best.gold)} {best.gold_ci}: {leads} ({scale})."
    open_gaps = ", ".join(f"{gap} over {gap.baseline}" for gap in gaps if not gap.clear)
    settled = [gap.baseline for gap in gaps if gap.clear]
    beaten = f" It does beat {' and '.join(settled)}." if settled else ""
    return f"No clear winner. Highest is {lead}, but its lead may be chance: {open_gaps} ({scale}).{beaten}"


def percent(value: float, interval: Interval) -> str:
    """Write a share with its interval: 61% [55%, 67%]."""
    return f"{value:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def _cell(value: float, interval: Interval) -> str:
    return f"{show(value)} {interval}"
