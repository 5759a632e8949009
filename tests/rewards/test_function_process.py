"""A reward function in a process of its own: hangs, crashes, prints, and nothing that is left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest

from rlhf.errors import DataError, RecipeError, TrainingError
from rlhf.recipe.load import load_recipe
from rlhf.rewards import function_process, user_function
from rlhf.rewards.function import FunctionReward, check_functions
from rlhf.types import Prompt, Rollout

PROMPT = Prompt("17", (1,), "question")
SOURCE = """\
import os, re, subprocess, sys, time

def judge(prompt, response, metadata):
    if response == "loop":
        while True:
            pass
    if response == "regex":
        re.match("(a+)+b", "a" * 40)
    if response == "exit":
        os._exit(3)
    if response == "quit":
        sys.exit("enough")
    if response == "fault":
        import ctypes
        ctypes.string_at(0)
    if response == "killed":
        os.kill(os.getpid(), 9)
    if response == "children":
        child = subprocess.Popen(["sleep", "60"])
        open(prompt, "w").write(str(child.pid))
        time.sleep(60)
    print("noise {", response)
    os.write(1, b"more noise")
    return len(response)
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    return f"{file}:judge"


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie, which nobody has asked about yet, has."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def failure(path: str, response: str, timeout_s: float = 5.0, prompt: Prompt = PROMPT) -> str:
    """Return what is said, once it is sure that the process is gone and the next call works."""
    reward = FunctionReward(path, timeout_s)
    process = reward.processes[0].process
    with pytest.raises(TrainingError) as error:
        reward.score_texts([prompt], [response])
    if "raised" not in str(error.value):
        assert process.returncode is not None
    assert reward.score_texts([PROMPT], ["next"]) == [4.0]
    return str(error.value)


@pytest.mark.parametrize(("response", "line"), [("loop", (5, 6)), ("regex", (8,))])
def test_a_hang_is_ended_and_the_line_named_even_when_the_interpreter_is_held(path, response, line):
    message = failure(path, response, timeout_s=2)
    file = path.removesuffix(":judge")
    assert message in [f"{file}:{n}: judge() did not return within 2 s (prompt id 17)" for n in line]


def test_the_limit_is_of_one_response_not_of_all(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef f(p, r, m):\n    time.sleep(0.7)\n    return 1\n")
    assert FunctionReward(f"{tmp_path}/slow.py:f", 4).score_texts([PROMPT] * 6, [""] * 6) == [1.0] * 6


@pytest.mark.parametrize(
    ("response", "line", "what"),
    [
        ("exit", 3, "ended its process with exit code 3"),
        ("quit", 12, "raised SystemExit: enough"),
        ("fault", 15, "ended its process with SIGSEGV"),
        ("killed", 3, "ended its process with SIGKILL, as the system does when memory runs out"),
    ],
)
def test_a_process_that_ends_is_an_error_and_never_a_zero(path, response, line, what):
    assert failure(path, response) == f"{path.removesuffix(':judge')}:{line}: judge() {what} (prompt id 17)"


def test_what_it_prints_goes_to_the_log_and_never_into_the_scores(path, caplog):
    file, _, function = path.rpartition(":")
    printing = Path(file).rename(Path(file).with_name("printing.py"))  # processes of other tests may print meanwhile
    with caplog.at_level(logging.INFO, logger="rlhf"):
        reward = FunctionReward(f"{printing}:{function}")
        assert reward.score_texts([PROMPT] * 3, ["a", "bb", "ccc"]) == [1.0, 2.0, 3.0]
        reward.processes[0].end()
        reward.processes[0].printing.join(20)
    said = [text for text in (record.getMessage() for record in caplog.records) if text.startswith("printing.py")]
    assert said == ["printing.py: noise { a", "printing.py: more noisenoise { bb", "printing.py: more noisenoise { ccc",
                    "printing.py: more noise"]  # fmt: skip


def test_the_caller_does_not_wait_until_it_asks_for_the_result(tmp_path):
    asked = tmp_path / "asked"
    waits = f"    while not os.path.exists({str(asked)!r}):\n        time.sleep(0.01)\n"
    (tmp_path / "slow.py").write_text(f"import os, time\ndef f(p, r, m):\n{waits}    return 2\n")
    pending = FunctionReward(f"{tmp_path}/slow.py:f").score([Rollout(PROMPT, (1,), (0.0,), "x", "stop", 0, 0)])
    asked.touch()
    assert pending.result().tolist() == [2.0]


def test_two_calls_at_once_keep_their_answers_apart(path):
    reward = FunctionReward(path)
    rollouts = [Rollout(PROMPT, (1,), (0.0,), "x" * n, "stop", 0, 0) for n in range(50)]
    pending = [reward.score(rollouts), reward.score(rollouts[::-1])]
    assert [scores.result().tolist() for scores in pending] == [list(range(50)), list(range(49, -1, -1))]


def test_children_of_the_function_end_with_it(path, tmp_path):
    failure(path, "children", timeout_s=3, prompt=Prompt("1", (1,), str(tmp_path / "pid")))
    assert gone(int((tmp_path / "pid").read_text()))


def written(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_it_dies_with_the_parent_however_that_ends(path, tmp_path):
    """The parent is killed outright; the processes of two functions, busy for ever, and a child of one go too."""
    code = (
        "import sys; from rlhf.rewards.function import FunctionReward; from rlhf.types import Prompt, Rollout\n"
        "rewards = {name: FunctionReward(sys.argv[1]) for name in ('regex', 'children')}\n"
        "prompt = Prompt('1', (1,), sys.argv[2])\n"
        "waits = [r.score([Rollout(prompt, (1,), (0.0,), name, 'stop', 0, 0)]) for name, r in rewards.items()]\n"
        "print(*(reward.processes[0].process.pid for reward in rewards.values()), flush=True)\n"
        "waits[0].result()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, path, str(tmp_path / "pid")], stdout=subprocess.PIPE)
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        ends = time.monotonic() + 60
        while not (child := written(tmp_path / "pid")) and time.monotonic() < ends:
            time.sleep(0.01)
        pids.append(int(child))
        parent.send_signal(signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


def test_it_ends_when_nobody_holds_it_any_more(path):
    reward = FunctionReward(path)
    pid = reward.processes[0].process.pid
    del reward
    assert gone(pid)


def test_dates_arrive_as_text_and_what_has_no_form_is_a_data_error(tmp_path):
    (tmp_path / "when.py").write_text("def f(p, r, m):\n    return len(m['when'])\n")
    reward = FunctionReward(f"{tmp_path}/when.py:f")
    assert reward.score_texts([Prompt("1", (1,), "p", {"when": date(2024, 2, 29)})], [""]) == [10.0]
    with pytest.raises(DataError, match="prompt id 3: its metadata cannot be given to a reward function"):
        reward.score_texts([Prompt("3", (1,), "p", {"when": object()})], [""])


def test_every_text_arrives_as_it_is(tmp_path):
    texts = ["", "\n", "\r\u2028\x00", "\U0001f600", "\ud800", '"}\n{"', "x" * 300_000]
    (tmp_path / "same.py").write_text("def f(p, r, m):\n    return float(p == r == m['r'])\n")
    prompts = [Prompt("1", (1,), text, {"r": text}) for text in texts]
    assert FunctionReward(f"{tmp_path}/same.py:f").score_texts(prompts, texts) == [1.0] * len(texts)


def test_the_environment_is_ours_and_so_is_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "12")
    monkeypatch.chdir(tmp_path)
    Path("env.py").write_text("import os\ndef f(p, r, m):\n    return int(os.environ['MY_KEY'])\n")
    assert FunctionReward("env.py:f").score_texts([PROMPT], [""]) == [12.0]


def test_starting_imports_the_standard_library_alone():
    code = f"""
import importlib.util, sys
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("child", {user_function.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - sys.stdlib_module_names))
"""
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout == "\n"


def test_a_module_of_ours_beside_it_hides_none_of_the_standard_library(tmp_path):
    (tmp_path / "web.py").write_text("import http.client\ndef f(p, r, m):\n    return http.client.OK\n")
    assert FunctionReward(f"{tmp_path}/web.py:f").score_texts([PROMPT], [""]) == [200.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os\nos._exit(9)\n", ":1: cannot be imported: it ended its process with exit code 9"),
        ("x = 1\nraise SystemExit(2)\n", ":2: cannot be imported: SystemExit: 2"),
        (
            "import time\ntime.sleep(60)\n",
            ":2: is still being imported after 0.5 s; raise load_timeout_s of the"
            " function judge, or load less at import",
        ),
    ],
)
def test_an_import_that_does_not_come_back_is_a_recipe_error(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(RecipeError) as error:
        FunctionReward(f"{tmp_path}/bad.py:f", load_timeout_s=0.5 if "sleep" in source else 60.0)
    assert str(error.value) == f"{tmp_path}/bad.py{message}"


def test_people_are_told_that_an_import_takes_long(tmp_path, monkeypatch, caplog):
    """The file waits until that has been said."""
    monkeypatch.setattr(function_process, "NOTICE_S", 0.01)
    (tmp_path / "slow.py").write_text(
        f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'said')!r}).exists():\n    time.sleep(0.01)\n"
        "def f(p, r, m):\n    return 1\n"
    )

    def said(record):
        (tmp_path / "said").touch()
        return True

    with caplog.at_level(logging.WARNING, logger="rlhf"):
        caplog.handler.addFilter(said)
        assert FunctionReward(f"{tmp_path}/slow.py:f", load_timeout_s=60).score_texts([PROMPT], [""]) == [1.0]
    assert "slow.py is still being imported after 0 s (load_timeout_s 60)" in caplog.messages[0]


def test_a_recipes_functions_are_looked_at_before_anything_is_computed(tmp_path, path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    stage = "{name: pairs, kind: annotate, policy: base, prompts: {path: prompts.jsonl}, judge: {kind: function, path: "
    for name in ("judge", "jugde"):
        text = f'name: t\nmodel: {{path: "tiny://llama"}}\nstages:\n  - {stage}"mine.py:{name}"}}}}\n'
        (tmp_path / f"{name}.yaml").write_text(text)
    check_functions(load_recipe(tmp_path / "judge.yaml", ()).recipe)
    with pytest.raises(RecipeError, match=r"mine\.py: has no function 'jugde'"):
        check_functions(load_recipe(tmp_path / "jugde.yaml", ()).recipe)


def test_starting_is_cheap(path):
    FunctionReward(path)
    seconds = []
    for _ in range(5):
        start = time.process_time(), os.times().children_user
        reward = FunctionReward(path)
        reward.processes[0].end()
        seconds.append(time.process_time() - start[0] + os.times().children_user - start[1])
    assert min(seconds) < 0.25
