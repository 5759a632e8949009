"""What is seen of a run: few plain lines in a log file, one live line on a terminal."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

from rlhf import progress
from rlhf.progress import Display, brief


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test moves."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def plain() -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, force_terminal=False, width=60)), out


def run(display: Display, clock: SimpleNamespace, steps: int, seconds: float) -> None:
    with display:
        display.stage("ppo", steps)
        for step in range(1, steps + 1):
            clock.seconds += seconds
            display.step(step, {"loss": 1 / step})


def test_brief_shows_what_people_watch_in_a_fixed_order():
    metrics = {"tokens_per_second": 1234.5, "loss": 0.123456, "grad_norm": 3.0, "kl": 2.0}
    assert brief(metrics) == "loss 0.123  kl 2  tok/s 1.23e+03"
    assert brief({"grad_norm": 3.0}) == ""


def test_a_log_file_gets_a_line_every_ten_seconds_and_the_last_step(clock):
    display, out = plain()
    run(display, clock, steps=25, seconds=1.0)
    assert out.getvalue().splitlines() == [
        "ppo: 25 steps",
        "ppo: step 10/25  loss 0.1  eta 15s",
        "ppo: step 20/25  loss 0.05  eta 5s",
        "ppo: step 25/25  loss 0.04  eta 0s",
    ]


@pytest.mark.parametrize(("steps", "seconds", "lines"), [(100_000, 0.001, 11), (1000, 30.0, 1001), (1, 0.01, 2)])
def test_lines_are_bounded_by_time_and_by_steps(clock, steps, seconds, lines):
    display, out = plain()
    run(display, clock, steps, seconds)
    assert abs(len(out.getvalue().splitlines()) - lines) <= 1
    assert f"step {steps}/{steps}" in out.getvalue()


def test_a_log_file_gets_no_control_characters_and_no_wrapped_lines(clock):
    display, out = plain()
    display.say("x" * 200 + " [bold]not markup[/bold] [1/6]")
    run(display, clock, steps=3, seconds=11.0)
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    assert out.getvalue().splitlines()[0] == "x" * 200 + " [bold]not markup[/bold] [1/6]"


def test_each_stage_starts_its_own_clock(clock):
    display, out = plain()
    run(display, clock, steps=2, seconds=9.0)
    run(display, clock, steps=2, seconds=9.0)
    assert out.getvalue().splitlines() == 2 * ["ppo: 2 steps", "ppo: step 2/2  loss 0.5  eta 0s"]


def test_what_goes_on_before_the_first_step_is_a_line_or_a_bar_without_a_length():
    display, out = plain()
    display.wait("[1/6] sft: loading models and data")
    assert out.getvalue() == "[1/6] sft: loading models and data\n"
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=120)) as display:
        display.wait("starting Ray on this machine")
        display.wait("[1/6] sft: loading models and data")
        assert display.bar is not None
        assert [(task.description, task.total) for task in display.bar.tasks] == [
            ("[1/6] sft: loading models and data", None)
        ]
    assert "/?" not in out.getvalue()


def test_a_terminal_shows_one_bar_of_the_current_stage():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Display(console) as display:
        assert display.bar is not None
        for label in ("sft training", "ppo"):
            display.stage(label, 4)
            for step in range(1, 5):
                display.step(step, {"loss": 0.25})
            display.say(f"{label} [done]")
        assert [task.description for task in display.bar.tasks] == ["ppo"]
        assert display.bar.tasks[0].completed == 4
    printed = out.getvalue()
    assert "4/4" in printed
    assert "loss 0.25" in printed
    assert printed.count("sft training [done]") == 1
    assert "ppo: step" not in printed
    assert printed.endswith("\x1b[?25h")


def test_warnings_are_shown_while_the_run_goes_on_and_nothing_else_is():
    display, out = plain()
    log = logging.getLogger("rlhf")
    with display:
        log.warning("waiting for the cluster: needed %d CPU", 3)
        log.error("shown where the run ends")
    log.warning("too late")
    assert out.getvalue() == "waiting for the cluster: needed 3 CPU\n"


def test_a_budget_that_ends_early_shortens_what_is_expected(clock):
    display, out = plain()
    with display:
        display.stage("dpo", 1000)
        display.expect(4)
        clock.seconds += 20
        display.step(2, {"loss": 0.5})
    assert out.getvalue().splitlines()[-1] == "dpo: step 2/4  loss 0.5  eta 20s"
