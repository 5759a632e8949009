"""The pure parts of the comparison with TRL: order, medians, what makes a row void, and the operations of a step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.benchmarks.peers.limits import forward_flops, step_flops
from tests.benchmarks.peers.protocol import busiest, disagreement, drift, interleaved, step_seconds
from tests.benchmarks.peers.rows import ROWS, Row
from tests.benchmarks.peers.task import Example, Outcome, Task, reward_of
from tests.benchmarks.peers.verdict import recorded, verdict

SHAPE = {
    "hidden_size": 2,
    "intermediate_size": 3,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 7,
}
PAIR = Example([1, 2, 3], [[4, 5], [6]])


def test_arms_go_there_and_back() -> None:
    assert interleaved(["ours", "defaults", "tuned"], 2) == ["ours", "defaults", "tuned", "tuned", "defaults", "ours"]
    assert interleaved(["ours", "defaults"], 1) == ["ours", "defaults"]


def test_the_median_is_over_all_processes_without_their_warmup() -> None:
    outcomes = [Outcome(seconds=[90, 3, 1]), Outcome(seconds=[80, 2, 9])]
    assert step_seconds(outcomes, warmup=1) == 2.5  # of 1, 2, 3, 9


def test_the_reference_belongs_to_the_step_it_was_computed_for() -> None:
    outcomes = [Outcome(seconds=[5, 1, 2], reference_seconds=[9, 10, 20])]
    assert step_seconds(outcomes, warmup=1) == 1.5
    assert step_seconds(outcomes, warmup=1, with_reference=True) == 16.5  # of 11 and 22
    assert step_seconds([Outcome(seconds=[1, 2])], warmup=1, with_reference=True) == 2


def test_curves_agree_within_two_percent_and_gradients_within_ten() -> None:
    ours = Outcome(losses=[2.0, 1.0], grad_norms=[10.0, 5.0])
    assert disagreement(ours, Outcome(losses=[2.03, 1.01], grad_norms=[10.9, 4.6])) is None
    assert "losses of step 1" in str(disagreement(ours, Outcome(losses=[2.0, 1.05], grad_norms=[10.0, 5.0])))
    assert "grad_norms of step 0" in str(disagreement(ours, Outcome(losses=[2.0, 1.0], grad_norms=[12.0, 5.0])))


def test_a_loss_that_is_not_a_number_agrees_with_nothing() -> None:
    assert disagreement(Outcome(losses=[float("nan")]), Outcome(losses=[1.0]))
    assert disagreement(Outcome(losses=[1.0]), Outcome(grad_norms=[1.0])) == "no losses to compare"
    assert disagreement(Outcome(losses=[1.0]), Outcome(losses=[1.0, 1.0]))


def test_what_one_side_does_not_tell_is_left_to_the_other_measure() -> None:
    assert disagreement(Outcome(grad_norms=[1.0]), Outcome(losses=[0.0], grad_norms=[1.05])) is None
    assert disagreement(Outcome(grad_norms=[1.0]), Outcome(losses=[0.0], grad_norms=[1.5])) is not None


def test_a_machine_that_slows_down_is_told() -> None:
    assert drift([1.0, 1.1, 1.14]) is None
    assert drift([1.0, 1.2, 1.1]) == "the GEMM ceiling drifted by 20%"


def test_the_busiest_process_counts_from_its_own_beginning() -> None:
    assert busiest({1: 100.0, 2: 5.0}, {1: 101.0, 2: 8.0, 3: 2.0}, seconds=10) == pytest.approx(0.3)
    assert busiest({1: 100.0}, {}, seconds=10) == 0


def test_operations_of_a_pair_by_hand() -> None:
    # a layer: q and o 2x2, k and v 2x1, three MLP matrices 2x3 -> 8 + 4 + 18 = 30 weights; 3 + 2 + 1 tokens
    linear = 2 * 5 * 30 * 6
    # causal pairs: prompt 1 + 2 + 3; chosen 4 + 5; rejected 4
    attention = 4 * 5 * 2 * (6 + 9 + 4)
    head = 2 * 2 * 7 * 3
    assert forward_flops(PAIR, SHAPE, head=False) == linear + attention
    assert forward_flops(PAIR, SHAPE, head=True) == linear + attention + head


def test_a_step_is_the_passes_that_the_row_needs() -> None:
    causal, scalar = forward_flops(PAIR, SHAPE, head=True), forward_flops(PAIR, SHAPE, head=False)
    assert step_flops("dpo", [PAIR, PAIR], SHAPE) == 6 * causal
    assert step_flops("reward", [PAIR], SHAPE) == 3 * scalar
    assert step_flops("grpo", [PAIR], SHAPE) == 4 * causal
    sampled = Example([1, 2, 3], [[0] * 48])
    both = forward_flops(sampled, SHAPE, head=True) + forward_flops(sampled, SHAPE, head=False)
    assert step_flops("ppo", [Example([1, 2, 3], [])], SHAPE) == 8 * both  # two epochs of 3, two forward


def test_real_tokens_have_the_prompt_in_each_sequence() -> None:
    assert PAIR.tokens() == 3 + 2 + 3 + 1
    assert ROWS["dpo"].tokens([PAIR, PAIR]) == 18
    assert ROWS["ppo"].tokens([Example([1, 2], [])]) == 50


def test_a_row_reaches_all_its_aims_or_names_those_it_missed() -> None:
    row = Row("x", 1, 1, 1, 1, 0.0, aim_defaults=8, aim_tuned=6, aim_limit=0.3)
    assert verdict(row, {"defaults": 8.0, "tuned": 6.5}, 0.3) == "reached"
    assert verdict(row, {"defaults": 7.5, "tuned": 6.5}, 0.2) == "missed: defaults 7.50 of 8, limit 0.20 of 0.3"
    assert verdict(Row("x", 1, 1, 1, 1, 0.0), {"defaults": 9.0}, 0.9) == "no aim"


def test_a_void_row_has_no_figures() -> None:
    void = recorded("dpo", {"ratio": {"defaults": 9.0}}, ["busy", "busy"], "reached")
    assert void == {"row": "dpo", "verdict": "void", "void": ["busy"], "unreliable": {"ratio": {"defaults": 9.0}}}
    assert recorded("dpo", {"a": 1}, [], "reached")["figures"] == {"a": 1}


def test_tasks_and_rewards_survive_the_way_to_another_process(tmp_path: Path) -> None:
    task = Task("dpo", "ours", "a", "b", 2, [[{"prompt": [1], "completions": [[2], [3]]}]])
    task.write(tmp_path / "task.json")
    assert Task.read(tmp_path / "task.json").examples() == [[Example([1], [[2], [3]])]]
    assert reward_of([2, 3, 4, 1]) == 0.5
