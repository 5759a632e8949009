"""Forgetting: numbers worked by hand, an interval against a plain bootstrap of the ratio, and what is said of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from made import comparison, samples
from rich.console import Console

from rlhf.errors import TrainingError
from rlhf.report.evaluation import Evaluation, merge
from rlhf.report.findings import diagnose
from rlhf.report.html import write_html
from rlhf.report.json import read_json, write_json
from rlhf.report.samples import ChatScores
from rlhf.report.table import comparison_table


def kept(name, nats, tokens, **other):
    return replace(samples(name, **other), retention=ChatScores.of(nats, tokens))


def test_the_mean_is_nats_over_tokens_and_the_difference_is_paired():
    tokens = (1, 2, 5)
    found = comparison(
        kept("sft", (1.0, 3.0, 4.0), tokens), kept("ppo", (2.0, 3.0, 7.0), tokens), kept("dpo", (1.0, 3.0, 4.0), tokens)
    )
    sft, ppo, dpo = (found.candidate(name).retention for name in ("sft", "ppo", "dpo"))
    assert (sft.nll, sft.chats, sft.tokens, sft.difference) == (1.0, 3, 8, None)
    assert ppo.nll == 12 / 8
    assert ppo.difference.difference == 4 / 8
    assert (ppo.difference.candidate, ppo.difference.baseline, ppo.difference.n) == ("ppo", "sft", 3)
    assert (dpo.difference.difference, tuple(dpo.difference.ci)) == (0.0, (0.0, 0.0))
    assert not ppo.difference.clear  # three chats are too few
    assert "retention" not in found.metrics


def test_the_interval_is_that_of_a_bootstrap_of_the_ratio_over_chats():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 40, 60)
    base = tokens * rng.gamma(4, 0.4, 60)
    worse = base + tokens * rng.normal(0.15, 0.3, 60)
    found = comparison(kept("sft", base.tolist(), tokens.tolist()), kept("ppo", worse.tolist(), tokens.tolist()))
    rows = rng.integers(0, 60, (4000, 60))
    ratios = (worse - base)[rows].sum(axis=1) / tokens[rows].sum(axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    difference = found.candidate("ppo").retention.difference
    assert difference.difference == pytest.approx((worse - base).sum() / tokens.sum())
    assert difference.ci.low == pytest.approx(low, abs=0.25 * (high - low) / 2)
    assert difference.ci.high == pytest.approx(high, abs=0.25 * (high - low) / 2)
    own = np.quantile(base[rows].sum(axis=1) / tokens[rows].sum(axis=1), (0.025, 0.975))
    assert found.candidate("sft").retention.nll_ci == pytest.approx(own, rel=0.05)


def test_runs_of_a_method_are_averaged():
    tokens = (2,) * 12
    runs = [kept(f"ppo@{n}", [2.0 * nats] * 12, tokens) for n, nats in ((1, 1.2), (2, 1.4))]
    found = comparison(kept("sft", [2.0] * 12, tokens), *runs)
    assert found.candidate("ppo").retention.nll == pytest.approx(1.3)
    assert found.candidate("ppo").retention.difference.difference == pytest.approx(0.3)


@pytest.fixture
def forgetful():
    tokens = [10] * 24
    base = (10 + np.sin(np.arange(24))).tolist()
    worse = [value + 1.2 + 0.1 * math.cos(place) for place, value in enumerate(base)]
    slightly = [value + 0.1 + 0.01 * math.cos(place) for place, value in enumerate(base)]
    return (
        kept("sft", base, tokens), kept("ppo", worse, tokens, gold=1.0, reward=1.0),
        kept("dpo", slightly, tokens, gold=1.0, reward=1.0),
    )  # fmt: skip


def test_forgetting_that_matters_is_said(forgetful):
    found = [item for item in diagnose(comparison(*forgetful), {}) if item.name == "forgets"]
    assert [item.subject for item in found] == ["ppo"]
    assert found[0].evidence.startswith("+0.12 [0.12, 0.12] nats a token on retention: 24 chats")
    assert "now 1.12 nats a token (1.00 for sft)" in found[0].evidence


def test_it_is_in_the_table_the_page_and_the_json(forgetful, tmp_path):
    made = comparison(*forgetful)
    console = Console(record=True, width=200)
    console.print(comparison_table(made))
    shown = console.export_text()
    assert "forgets, nats a token" in shown
    assert "+0.12 [0.12, 0.12]" in shown
    assert "(at 1.00)" in shown
    write_html(tmp_path / "report.html", made, {}, forgetful, {})
    page = (tmp_path / "report.html").read_text()
    assert "Forgetting, nats a token" in page
    assert '<b class="down">+0.12</b>' in page
    assert "24 chats that training did not aim at" in page
    write_json(tmp_path / "report.json", made)
    assert read_json(tmp_path / "report.json") == made


def test_nothing_is_shown_without_it(tmp_path):
    made = comparison(samples("sft"), samples("ppo"))
    assert made.candidate("ppo").retention is None
    write_html(tmp_path / "report.html", made, {}, (samples("sft"), samples("ppo")), {})
    assert "Forgetting" not in (tmp_path / "report.html").read_text()
    console = Console(record=True, width=200)
    console.print(comparison_table(made))
    assert "forgets" not in console.export_text()


def test_other_chats_and_numbers_that_are_none_are_refused():
    first = kept("sft", [1.0] * 12, [1] * 12)
    with pytest.raises(TrainingError, match="ppo was not asked for the same retention chats as sft"):
        comparison(first, kept("ppo", [1.0] * 12, [2] * 12))
    with pytest.raises(TrainingError, match="ppo gives retention chat 2 a probability of 0"):
        comparison(first, kept("ppo", [1.0, math.inf] + [1.0] * 10, [1] * 12))


def test_runs_that_kept_other_chats_are_compared_without():
    def evaluated(key, nats):
        return Evaluation(
            baseline="sft", baseline_key="same", reward_key="", conditions={}, frontier=(), budget=None,
            candidates=(kept("sft", [1.0] * 12, [1] * 12), kept("ppo", [nats] * 12, [1] * 12)), reward_accuracy=None,
            facts={}, seed=1, bootstrap_samples=100, retention_key=key,
        )  # fmt: skip

    both = merge({"one": evaluated("a", 2.0), "two": evaluated("a", 3.0)}).compare()
    assert both.candidate("two/ppo").retention.difference.difference == 2.0
    apart = merge({"one": evaluated("a", 2.0), "two": evaluated("b", 3.0)}).compare()
    assert apart.candidate("two/ppo").retention is None
