"""`rlhf serve`: what shares an engine, how it is started, and one real server with two adapters."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from rlhf.cli import main
from rlhf.done_file import read_done, write_done
from rlhf.errors import RecipeError, ResourceError
from rlhf.export.source import find_models
from rlhf.models.tokenizer import load_tokenizer
from rlhf.serving.plan import plan_serving
from rlhf.serving.server import Endpoint, Limits, arguments, environment, free_port

READY_S = 240
QUESTION = [{"role": "user", "content": "Name moss"}]


def plan(run, *names):
    return plan_serving(find_models([str(run / name) for name in names]))


def test_one_stage_is_served_merged(run):
    serving = plan(run, "dpo")
    assert serving.names == ["dpo"]
    assert serving.folder == run / "stages" / "dpo" / "model"
    assert not serving.adapters


def test_stages_of_one_start_are_adapters_of_it(run):
    start = (run / "stages" / "sft" / "model").resolve()
    for asked in (("dpo", "ipo"), ("sft", "dpo", "ipo"), ("dpo", "sft", "ipo")):
        serving = plan(run, *asked)
        assert serving.folder == start
        assert serving.names == ["sft", "dpo", "ipo"]
        assert serving.adapters["ipo"] == run / "stages" / "ipo" / "adapter"
        assert serving.rank == 8


def test_a_stage_and_the_model_it_began_with_need_no_name_for_the_rest(run):
    serving = plan(run, "sft", "dpo")
    assert serving.names == ["sft", "dpo"]


def test_what_does_not_share_a_start_is_said(run):
    with pytest.raises(RecipeError, match=r"dpo began with taken/sft, full has no adapter.*--port of its own"):
        plan(run, "dpo", "full")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "ipo: vLLM cannot serve DoRA beside other models; serve it alone"),
        ({"peft_type": "IA3"}, "cannot serve an adapter of kind IA3"),
        ({"init_lora_weights": "pissa"}, "cannot serve an adapter that began as pissa"),
        ({"r": 1024}, "its adapter has rank 1024, vLLM serves those up to 512"),
        ({"rank_pattern": {"q_proj": 40}}, None),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused_before_it_starts(run, tmp_path, change, said):
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    file = copied / "stages" / "ipo" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    done = copied / "stages" / "ipo" / "done.json"
    write_done(done, read_done(done) | {"adapter": None})
    if said is None:
        assert plan(copied, "dpo", "ipo").rank == 64
        return
    with pytest.raises(RecipeError, match=re.escape(said)):
        plan(copied, "dpo", "ipo")


def test_plain_folders_and_equal_names_are_served_too(run, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(run / "stages" / "sft" / "model", folder)
    assert plan_serving(find_models([str(folder)])).names == ["mine"]
    other = tmp_path / "other"
    shutil.copytree(run, other)
    names = [model.name for model in find_models([str(run / "dpo"), str(other / "dpo")])]
    assert names == ["taken/dpo", "other/dpo"]
    with pytest.raises(RecipeError, match="scores or classifies texts"):
        find_models([str(run / "rm")])


def test_no_code_no_key_among_arguments_no_loading_of_adapters(run):
    endpoint = Endpoint("127.0.0.1", 8123, "topsecretkey")
    serving = plan(run, "dpo", "ipo")
    given = arguments(serving, endpoint, Limits(2, 128))
    assert "topsecretkey" not in " ".join(given)
    assert ("--no-enable-chunked-prefill" in given) is not Path("/dev/nvidiactl").exists()
    assert not any("trust" in one for one in given)
    assert given[given.index("--max-model-len") + 1] == "128"
    modules = given[given.index("--lora-modules") + 1 :]
    assert [json.loads(one)["name"] for one in modules] == ["dpo", "ipo"]
    own = environment(serving, endpoint, Limits(2))
    assert own["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == own["VLLM_SERVER_DEV_MODE"] == "0"
    assert own["OMP_NUM_THREADS"] == "2"
    assert own["VLLM_API_KEY"] == "topsecretkey"
    assert "localhost" in own["RLHF_SERVE_HOSTS"]
    assert environment(serving, Endpoint("0.0.0.0", 1, "k"), Limits(1))["RLHF_SERVE_HOSTS"] == ""


def test_a_taken_port_is_said_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ResourceError, match="another with --port"):
        free_port("127.0.0.1", server.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 0


def test_other_machines_are_let_in_with_a_key_alone(run, monkeypatch):
    def serve(*options):
        return CliRunner().invoke(main, ["serve", str(run / "nope"), "--port", "0", *options])

    refused = serve("--host", "0.0.0.0")
    assert refused.exit_code == 2
    assert "give --api-key-env VAR" in refused.output
    missing = serve("--api-key-env", "NOT_THERE")
    assert "--api-key-env NOT_THERE: the variable is not set" in missing.output
    monkeypatch.setenv("MY_KEY", "a-long-key")
    warned = serve("--host", "0.0.0.0", "--api-key-env", "MY_KEY")
    assert "warning: 0.0.0.0 is reachable from other machines" in warned.output
    assert "has no stage nope" in warned.output


class Started:
    """`rlhf serve` in a process, until its ready line."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "rlhf.cli", "serve", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.printed = ""

    def ready(self) -> str:
        """Wait for it and return the URL."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if select.select([self.process.stdout], [], [], 1.0)[0]:
                line = self.process.stdout.readline()
                self.printed += line
                if found := re.match(r"ready: (\S+)", line):
                    self.printed += self.process.stdout.readline()
                    return found[1]
                if not line:
                    break
        raise AssertionError(f"not ready: {self.printed}")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.mark.vllm
def test_two_adapters_and_their_start_answer_by_name_and_leave_no_process(run, tmp_path):
    from openai import AuthenticationError, NotFoundError, OpenAI

    os.environ["SERVE_KEY"] = "a-long-key"
    started = Started(str(run / "dpo"), str(run / "ipo"), "--port", "0", "--threads", "1", "--api-key-env", "SERVE_KEY")
    try:
        url = started.ready()
        assert "curl http://127.0.0.1:" in started.printed
        assert "Bearer $SERVE_KEY" in started.printed
        client = OpenAI(base_url=url, api_key="a-long-key", max_retries=0)
        assert sorted(model.id for model in client.models.list()) == ["dpo", "ipo", "sft"]
        answers = {name: answer(client, name) for name in ("sft", "dpo", "ipo")}
        for name, likely in answers.items():
            assert sorted(likely.values()) == pytest.approx(sorted(expected(run, name).values()), abs=2e-4), name
        assert sorted(answers["dpo"].values()) != pytest.approx(sorted(answers["sft"].values()), abs=2e-3)
        assert sorted(answers["ipo"].values()) != pytest.approx(sorted(answers["dpo"].values()), abs=2e-3)
        with pytest.raises(NotFoundError):
            answer(client, "other")
        with pytest.raises(AuthenticationError):
            answer(OpenAI(base_url=url, api_key="wrong", max_retries=0), "sft")
        chat = CliRunner().invoke(
            main,
            [
                "chat",
                "sft",
                "dpo",
                "--url",
                url,
                "--api-key-env",
                "SERVE_KEY",
                "--temperature",
                "0",
                "--max-tokens",
                "8",
            ],
            input="Say cab.\n/quit\n",
        )
        assert chat.exit_code == 0, chat.output
        assert "sft" in chat.output
        family = started.family()
        assert family
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(60) == 143
        assert not psutil.wait_procs(family, 10)[1], "processes are left"
    finally:
        del os.environ["SERVE_KEY"]
        started.end()


def answer(client, name: str) -> dict[str, float]:
    """Return the most likely first tokens of the answer to a question, with their log-probabilities."""
    done = client.chat.completions.create(
        model=name, messages=QUESTION, temperature=0, max_tokens=1, logprobs=True, top_logprobs=5
    )
    return {one.token: one.logprob for one in done.choices[0].logprobs.content[0].top_logprobs}


def expected(run: Path, stage: str) -> dict[str, float]:
    """Return the same of the stage's merged model in transformers."""
    folder = run / "stages" / stage / "model"
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logprobs = model(torch.tensor([tokenizer.prompt_ids(QUESTION)])).logits[0, -1].log_softmax(-1)
    return {tokenizer.hf.decode([index]): logprobs[index].item() for index in logprobs.topk(5).indices.tolist()}
