"""Points of the frontier from samples, by hand."""

import numpy as np
import pytest
from made import comparison, samples

from rlhf.report.frontier import frontier_point, paths
from rlhf.report.samples import Sample, Samples


def sample(prompt, gold, reward, kl, tokens):
    return Sample(prompt, "q", "r", gold, reward, kl, tokens, "stop", 1.0)


def test_a_point_is_means_and_standard_errors_over_prompts():
    rows = [sample("a", 0.0, 1.0, 2.0, 5), sample("a", 1.0, 1.0, 4.0, 7), sample("b", 2.5, 3.0, 9.0, 12)]
    found = frontier_point("ppo@2", Samples.of(rows), step=30)
    assert (found.method, found.run, found.step) == ("ppo", "ppo@2", 30)
    assert (found.gold, found.reward, found.kl, found.length) == (1.5, 2.0, 6.0, 9.0)
    assert found.gold_se == pytest.approx(np.std([0.5, 2.5], ddof=1) / np.sqrt(2))
    assert (found.reward_se, found.kl_se) == (pytest.approx(1.0), pytest.approx(3.0))


def test_one_prompt_has_no_error_and_no_proxy_no_reward():
    found = frontier_point("sft", Samples.of([sample("a", 1.0, None, 0.0, 5)]))
    assert (found.gold_se, found.reward, found.reward_se, found.step) == (None, None, None, None)


def test_paths_go_through_the_checkpoints_to_the_finished_policy():
    points = [frontier_point("ppo", samples("ppo", gold=step / 10).samples, step) for step in (20, 5)]
    found = comparison(samples("sft"), samples("ppo", gold=3.0), frontier=points)
    assert {run: [point.step for point in path] for run, path in paths(found).items()} == {
        "ppo": [5, 20, None],
        "sft": [None],
    }
