"""What `rlhf run` does with a folder that holds an unfinished, a changed or a damaged run."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlhf import command
from rlhf.checkpoint import states
from rlhf.cli import main
from rlhf.errors import LateProcess, LostProcess
from rlhf.fingerprint import differences
from rlhf.interrupts import Interrupted, Interrupts
from rlhf.local import LocalLauncher, LocalModel, LocalRollout
from rlhf.tracking import Tracker

RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: lora, r: 4}
roles: {rollout: {engine: transformers}}
recovery: {every_steps: 1, keep_last: 2}
stages:
  - {name: sft, kind: sft, data: {path: sft.jsonl}, batch_size: 1, epochs: 2}
"""


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "leave", sys.exit)  # which would end the tests too


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(4)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def run(folder: Path, *options: str) -> Result:
    arguments = ["run", str(folder / "recipe.yaml"), "--local", "--output", str(folder / "out"), *options]
    return CliRunner().invoke(main, arguments)


def steps(folder: Path) -> list[int]:
    lines = (folder / "out" / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture
def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that SIGTERM has ended after step 3 of 8."""
    record = Tracker.log

    def log(tracker: Tracker, step: int, metrics: dict) -> None:
        record(tracker, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log)
        result = run(folder)
    assert result.exit_code == 143
    assert result.stderr == "interrupted in stage sft, after step 3, which is saved; the same command goes on\n"
    return folder


def test_an_interrupted_run_goes_on(stopped):
    state = stopped / "out" / "stages" / "sft" / "state"
    assert [path.name for path in states(state)] == ["step-00000002", "step-00000003"]
    result = run(stopped)
    assert result.exit_code == 0
    assert "sft goes on after step 3" in result.stdout
    assert steps(stopped) == list(range(1, 9))
    assert not state.exists()


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("tail", [b"", b'{"step": 2, "lo', bytes(64)])
def test_rows_of_metrics_that_a_power_loss_took_are_counted_and_the_run_goes_on(stopped, kept, tail):
    file = stopped / "out" / "stages" / "sft" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:kept]) + tail)
    result = run(stopped)
    assert result.exit_code == 0, result.stderr
    assert f"sft resumes without {3 - kept} of its earlier rows" in result.stdout
    assert steps(stopped) == [*range(1, kept + 1), *range(4, 9)]


def test_other_settings_are_shown_and_refused_until_the_stage_is_restarted(stopped):
    result = run(stopped, "--set", "stages.sft.epochs=3", "--set", "seed=5")
    assert result.exit_code == 2
    assert "sft was interrupted after step 3 with other settings: seed 17 -> 5, epochs 2 -> 3" in result.stderr
    assert "--restart sft" in result.stderr
    result = run(stopped, "--set", "stages.sft.epochs=3", "--restart", "sft")
    assert result.exit_code == 0, result.stderr
    assert steps(stopped) == list(range(1, 13))


def test_a_damaged_state_is_set_aside_and_the_one_before_is_used(stopped):
    state = stopped / "out" / "stages" / "sft" / "state"
    file = next((state / "step-00000003").glob("policy-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert CliRunner().invoke(main, ["checkpoint", "verify", str(stopped / "out")]).exit_code == 3
    result = run(stopped)
    assert result.exit_code == 0
    assert "is damaged" in result.stdout
    assert "sft goes on after step 2" in result.stdout
    assert steps(stopped) == list(range(1, 9))


def test_an_unknown_stage_cannot_be_restarted(folder):
    result = run(folder, "--restart", "ppo")
    assert (result.exit_code, "no such stage" in result.stderr) == (2, True)


def test_a_damaged_stage_is_said_and_not_made_over(folder):
    assert run(folder).exit_code == 0
    assert "unchanged, reused" in run(folder).stdout
    model = folder / "out" / "stages" / "sft" / "model" / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-8])
    result = run(folder)
    assert result.exit_code == 3
    assert "stages/sft is damaged (model/model.safetensors: truncated" in result.stderr
    assert "--restart sft" in result.stderr
    assert model.read_bytes() == whole[:-8]
    result = run(folder, "--restart", "sft")
    assert result.exit_code == 0, result.stderr
    assert model.read_bytes() == whole
    (kept,) = folder.glob("out/stages/sft.*")
    assert (kept / "model" / "model.safetensors").read_bytes() == whole[:-8]


def test_a_lost_process_makes_the_stage_go_on_from_its_last_state(folder, monkeypatch):
    losses = iter([4, 4])  # in the fourth update of each of the first two attempts

    class Losing(LocalModel):
        def __init__(self, spec):
            super().__init__(spec)
            self.left = next(losses, 100)

        def train(self, *arguments):
            self.left -= 1
            if self.left == 0:
                raise LostProcess("policy.train: the process died")
            return super().train(*arguments)

    monkeypatch.setattr(LocalLauncher, "policy", lambda self, spec: Losing(spec))
    result = run(folder)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("goes on with new processes") == 2
    assert "goes on after step 3" in result.stdout
    assert "goes on after step 6" in result.stdout
    assert steps(folder) == list(range(1, 9))


def test_what_is_lost_too_often_ends_the_run(folder, monkeypatch):
    def lost(self, spec):
        raise LostProcess("policy.build: the process died")

    monkeypatch.setattr(LocalLauncher, "policy", lost)
    result = run(folder, "--set", "recovery.restarts=2")
    assert (result.exit_code, result.stdout.count("goes on with new processes")) == (5, 2)


def late(call):
    error = LateProcess("policy.train gave no answer within 9 s (ray.call_timeout_s); raise ray.call_timeout_s")
    error.call = call
    return error


@pytest.mark.parametrize(
    ("calls", "retries", "code"),
    [
        (["policy.train", "policy.train"], 1, 5),  # twice in the same step: no third attempt
        (["policy.train", "policy.logprobs", "policy.train"], 3, 0),  # other calls, so it is worth a try
    ],
)
def test_a_deadline_that_is_missed_twice_in_the_same_place_ends_the_run(folder, monkeypatch, calls, retries, code):
    named = iter(calls)

    class Late(LocalModel):
        def train(self, *arguments):
            if call := next(named, None):
                raise late(call)
            return super().train(*arguments)

    monkeypatch.setattr(LocalLauncher, "policy", lambda self, spec: Late(spec))
    result = run(folder)
    assert (result.exit_code, result.stdout.count("goes on with new processes")) == (code, retries)
    if code:
        assert "raise ray.call_timeout_s; that was the second time in the same place" in result.stderr


def test_a_deadline_that_is_missed_in_another_step_is_another_place(folder, monkeypatch):
    updates = iter([False, True, False, True])  # the second update of each attempt

    class Late(LocalModel):
        def train(self, *arguments):
            if next(updates, False):
                raise late("policy.train")
            return super().train(*arguments)

    monkeypatch.setattr(LocalLauncher, "policy", lambda self, spec: Late(spec))
    result = run(folder)
    assert (result.exit_code, result.stdout.count("goes on with new processes")) == (0, 2)


def test_signals_wait_where_they_may_and_the_second_does_not():
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(said.append) as interrupts:
        with pytest.raises(Interrupted) as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.value.exit_code == 130
        interrupts.wanted = None
        reached: list[str] = []

        def work(signals: int) -> None:
            with interrupts.deferred():
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
                    reached.append(f"after {signals}")

        with pytest.raises(Interrupted):
            work(1)
        assert (reached, len(said)) == (["after 1"], 1)
        interrupts.wanted = None
        with pytest.raises(Interrupted):
            work(2)
        assert (reached, len(said)) == (["after 1", "after 2"], 2)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_take_no_signals():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def enter() -> None:
        with Interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]


def test_annotation_goes_on_with_what_it_has(tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(9)))
    (tmp_path / "judge.py").write_text("def score(prompt, response, metadata):\n    return len(set(response))\n")
    stage = """\
  - {name: pairs, kind: annotate, policy: base, prompts: {path: prompts.jsonl}, max_prompt_tokens: 64,
     judge: {kind: function, path: "judge.py:score"}, max_response_tokens: 6, samples_per_prompt: 3}
"""
    (tmp_path / "recipe.yaml").write_text(RECIPE[: RECIPE.index("  - {name: sft")] + stage)
    two_prompts_a_round = ("--set", "roles.rollout.max_sequences=3")
    assert run(tmp_path, *two_prompts_a_round).exit_code == 0
    through = (tmp_path / "out").rename(tmp_path / "through") / "stages" / "pairs"
    drawn = []
    generate = LocalRollout.generate

    def interrupted(engine, prompts, *arguments):
        drawn.append(len(prompts))
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(engine, prompts, *arguments)

    monkeypatch.setattr(LocalRollout, "generate", interrupted)
    assert run(tmp_path, *two_prompts_a_round).exit_code == 130
    assert run(tmp_path, *two_prompts_a_round).exit_code == 0
    assert drawn == [2, 2, 2, *(2, 2, 1)]  # the third was drawn while the second was judged
    for name in ("pairs.jsonl", "best.jsonl"):
        assert (tmp_path / "out" / "stages" / "pairs" / name).read_bytes() == (through / name).read_bytes()


def test_an_interrupt_in_the_reference_passes_keeps_the_parts(tmp_path, monkeypatch):
    rows = [{"prompt": f"Say {n}.", "chosen": str(n), "rejected": "no"} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = "  - {name: dpo, kind: dpo, policy: base, data: {path: pairs.jsonl}, batch_size: 6, heldout_fraction: 0}\n"
    (tmp_path / "recipe.yaml").write_text(RECIPE[: RECIPE.index("  - {name: sft")] + stage)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rlhf.stages.reference_cache.PART", 4)
    asked = []
    logprobs = LocalModel.logprobs

    def interrupted(model, batch):
        asked.append(len(batch))
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return logprobs(model, batch)

    monkeypatch.setattr(LocalModel, "logprobs", interrupted)
    result = run(tmp_path)
    assert (result.exit_code, result.stderr) == (
        143,
        "interrupted in stage dpo, after part 2 of 3 of the reference's logprobs, which are kept;"
        " the same command goes on\n",
    )
    assert run(tmp_path).exit_code == 0
    assert asked == [4, 4, 4]


def test_differences_are_told_in_words():
    old = {"seed": 1, "stage": {"kl_coef": 0.05, "optimizer": {"betas": [0.9, 1]}}, "upstream": {"sft": "a"}}
    new = {"seed": 1, "stage": {"kl_coef": 0.1, "optimizer": {"betas": [0.9, 1]}, "top": 1}, "upstream": {"sft": "b"}}
    assert differences(old, new) == ["kl_coef 0.05 -> 0.1", "top null -> 1", "sft changed"]
