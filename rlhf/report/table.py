"""The comparison for the terminal: one table and one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.report.results import (
    FEWEST_PROMPTS,
    CandidateResult,
    Comparison,
    Interval,
    PairedDifference,
    Retention,
    show,
)
from rlhf.untrusted import visible

if TYPE_CHECKING:
    from rich.table import Table


NAMED_GAPS = 2


def comparison_table(comparison: Comparison) -> Table:
    """Return one row per method, best gold first, each number with its interval; what nobody measured is left out."""
    from rich.text import Text

    from rlhf.tables import WholeTable

    caption = f"{comparison.prompts} prompts, {seeds(comparison)}, {comparison.level:.0%} intervals"
    table = WholeTable(
        title="Comparison by gold reward",
        caption=Text(visible(f"{caption}; win rate against {comparison.baseline} (at equal length in brackets)")),
    )
    table.add_column("candidate")
    proxy = ["reward model"] if "reward" in comparison.metrics else []
    retention = ["forgets, nats a token"] if comparison.candidates[0].retention else []
    for heading in ("gold reward", *proxy, *retention, "KL to reference", "tokens", "win rate"):
        table.add_column(heading, justify="right")
    for item in comparison.ranked:
        cells = [_cell(item.gold, item.gold_ci)]
        if item.reward is not None and item.reward_ci is not None:
            cells.append(_cell(item.reward, item.reward_ci))
        if item.retention is not None:
            cells.append(forgetting(item.retention))
        cells += [_cell(item.kl, item.kl_ci), _cell(item.length, item.length_ci), _wins(comparison, item)]
        table.add_row(Text(visible(label(comparison, item))), *(Text(cell) for cell in cells))
    return table


def verdict(comparison: Comparison) -> str:
    """Say in a sentence who wins by gold: only one that is told from every other after Holm's correction."""
    ranked = comparison.ranked
    best, others = ranked[0], ranked[1:]
    lead = f"{best.name} with gold reward {show(best.gold)} {best.gold_ci}"
    if not others:
        return f"No winner: there is nothing to compare {lead} with."
    if comparison.prompts < FEWEST_PROMPTS:
        return f"No clear winner: {comparison.prompts} prompt(s) are too few to tell. Highest is {lead}."
    gaps = [comparison.difference(best.name, item.name, "gold") for item in others]
    scale = f"{comparison.level:.0%} paired intervals over {comparison.prompts} prompts, {seeds(comparison)}"
    scale += ", corrected for the number of comparisons" if len(others) > 1 else ""
    if all(gap.clear for gap in gaps):
        leads = " and ".join(f"{gap} over {gap.baseline}" for gap in gaps)
        return f"{best.name} wins by gold reward, {show(best.gold)} {best.gold_ci}: {leads} ({scale})."
    undecided = [gap for gap in gaps if not gap.clear]
    open_gaps = ", ".join(f"{gap} over {gap.baseline}{_chance(gap)}" for gap in undecided[:NAMED_GAPS])
    if len(undecided) > NAMED_GAPS:
        open_gaps += f", nor is it sure over {', '.join(gap.baseline for gap in undecided[NAMED_GAPS:])}"
    settled = [gap.baseline for gap in gaps if gap.clear]
    beaten = f" It does beat {' and '.join(settled)}." if settled else ""
    return f"No clear winner. Highest is {lead}, but its lead may be chance: {open_gaps} ({scale}).{beaten}"


def seeds(comparison: Comparison) -> str:
    """Say how many training runs stand behind a method: `one seed` or `3 seeds`."""
    counts = sorted({len(item.runs) for item in comparison.candidates if item.name != comparison.baseline} or {1})
    if counts == [1]:
        return "one seed"
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def label(comparison: Comparison, item: CandidateResult) -> str:
    """Return a method's name, with what sets it apart from the other rows."""
    marks = ["baseline"] if item.name == comparison.baseline else []
    marks += [f"{len(item.runs)} seeds"] if len(item.runs) > 1 else []
    return f"{item.name} ({', '.join(marks)})" if marks else item.name


def forgetting(retention: Retention) -> str:
    """Write what a method has lost on the retention chats, or how well the baseline predicts them."""
    change = retention.difference
    return f"{change}" if change else f"(at {show(retention.nll)})"


def percent(value: float, interval: Interval) -> str:
    """Write a share with its interval: 61% [55%, 67%]."""
    return f"{value:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def chance(p_value: float) -> str:
    """Write a p-value: `0.03`, `<0.001`."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}" if p_value < 0.01 else f"{p_value:.2f}"


def _chance(gap: PairedDifference) -> str:
    """Quote the corrected p-value where the interval alone would look clear."""
    hidden = gap.ci.above_zero or gap.ci.below_zero
    return f" (corrected p {chance(gap.p_corrected)})" if hidden else ""


def _wins(comparison: Comparison, item: CandidateResult) -> str:
    if item.name == comparison.baseline:
        return "-"
    controlled = comparison.win(item.name, comparison.baseline).length_controlled
    return f"{percent(item.win_rate, item.win_rate_ci)} ({controlled:.0%})"


def _cell(value: float, interval: Interval) -> str:
    return f"{show(value)} {interval}"
