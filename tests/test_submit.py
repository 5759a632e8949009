"""What `rlhf submit` does before a cluster is there: what it uploads, what it refuses, what it asks for."""

from __future__ import annotations

import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from actors import submit
from rlhf.cli import main
from rlhf.errors import RecipeError, ResourceError
from rlhf.recipe.load import load_recipe
from rlhf.recipe.upload import collect

BASE = """\
name: base
model: {path: "tiny://llama", dtype: float32, chat_template: ../shared/chat.jinja}
stages:
  - {name: sft, kind: sft, data: {path: sft.jsonl}}
"""
OWN = """\
extends: bases/base.yaml
name: trial
checkpoints: {theirs: models/theirs, hub: org/name}
stages:
  - name: ppo
    kind: ppo
    policy: sft
    reward: {kind: function, path: "judge.py:score"}
    prompts: {path: PROMPTS}
    steps: 2
  - name: duel
    kind: compare
    candidates: [sft, ppo, theirs]
    baseline: sft
    prompts: {path: heldout.jsonl}
    gold: {kind: function, path: "judge.py:score"}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A recipe with a base in another folder, an absolute path, a local model, and files that it does not name."""
    files = {
        "mine/bases/base.yaml": BASE,
        "mine/trial.yaml": OWN.replace("PROMPTS", str(tmp_path / "far/prompts.jsonl")),
        "mine/shared/chat.jinja": "{{ messages }}",
        "mine/bases/sft.jsonl": '{"messages": []}\n',
        "mine/judge.py": "def score(prompt, response, metadata): return 0.0\n",
        "mine/heldout.jsonl": '{"prompt": "a"}\n',
        "mine/models/theirs/config.json": "{}",
        "mine/.env": "SECRET=1",
        "mine/other.jsonl": "{}",
        "far/prompts.jsonl": '{"prompt": "b"}\n',
        "far/private.txt": "no",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(main, ["submit", *map(str, arguments)])


def test_only_what_the_recipe_names_is_uploaded(project):
    upload = collect(load_recipe(project / "mine/trial.yaml"))
    assert upload.recipe == "mine/trial.yaml"
    assert sorted(upload.files) == [
        "far/prompts.jsonl",
        "mine/bases/base.yaml",
        "mine/bases/sft.jsonl",
        "mine/heldout.jsonl",
        "mine/judge.py",
        "mine/shared/chat.jinja",
        "mine/trial.yaml",
    ]
    assert upload.models == (str(project / "mine/models/theirs"),)
    assert upload.size == sum(file.stat().st_size for file in upload.files.values())


def test_the_unpacked_archive_is_the_same_recipe_without_the_original(project, tmp_path_factory):
    loaded = load_recipe(project / "mine/trial.yaml", ["stages.ppo.steps=3"])
    upload = collect(loaded)
    archive = tmp_path_factory.mktemp("packed") / "a.zip"
    upload.write(archive)
    there = tmp_path_factory.mktemp("there")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(there)
    (project / "far/prompts.jsonl").unlink()
    again = load_recipe(there / upload.recipe, upload.overrides)
    assert again.recipe.ray.address == "auto"
    assert again.recipe.stages[1].steps == 3
    assert again.recipe.checkpoints == loaded.recipe.checkpoints
    moved = loaded.recipe.model_dump_json().replace(str(project), str(there))
    assert again.recipe.stages[1].prompts.path == there / "far/prompts.jsonl"
    assert again.recipe.stages[2].gold.path == str(there / "mine/judge.py:score")
    assert again.recipe.stages[0].model_dump_json() in moved


def test_only_paths_that_do_not_travel_are_overridden(project):
    upload = collect(load_recipe(project / "mine/trial.yaml"))
    assert upload.overrides == (
        'stages.ppo.prompts.path="../far/prompts.jsonl"',
        f'checkpoints.theirs="{project}/mine/models/theirs"',
        "ray.address=auto",
    )


def test_equal_files_give_equal_archives(project):
    upload = collect(load_recipe(project / "mine/trial.yaml"))
    upload.write(project / "a.zip")
    (project / "mine/judge.py").touch()
    upload.write(project / "b.zip")
    assert (project / "a.zip").read_bytes() == (project / "b.zip").read_bytes()


def test_the_command_survives_a_shell():
    made = submit.command("a b.yaml", ['x="$(false)"'], "runs/it's")
    assert (
        made == """exec rlhf run 'a b.yaml' --set 'x="$(false)"' --output "${RLHF_RUNS:-$HOME/runs}"/'runs/it'"'"'s'"""
    )
    assert submit.command("a.yaml", [], "/shared/x").endswith(" --output /shared/x")


def test_too_large_names_the_largest_file_and_the_remedy(project):
    upload = collect(load_recipe(project / "mine/trial.yaml"))
    submit.check_size(upload, 100 * 2**20)
    with pytest.raises(
        RecipeError, match=r"make an upload of 101 MiB, and Ray takes 100 MiB: the largest are mine/trial"
    ):
        submit.check_size(upload, 101 * 2**20)


def test_says_what_is_uploaded_and_what_not(project):
    lines = submit.describe(collect(load_recipe(project / "mine/trial.yaml")), 900)
    assert lines[0].startswith("uploading 7 files, ")
    assert lines[1].startswith("  mine/trial.yaml ")
    assert f"not uploaded, must be on the cluster under the same path: {project}/mine/models/theirs" in lines
    assert lines[-1].startswith("no environment variable goes with it")


def test_a_bad_recipe_is_refused_before_the_cluster_is_asked(project):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        result = invoke(project / "mine/trial.yaml", "--address", address, "--set", "stages.ppo.stepz=1")
        assert result.exit_code == 2
        assert "stages.ppo.stepz: unknown key" in result.stderr
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_bad_name_is_refused(project):
    result = invoke(project / "mine/trial.yaml", "--address", "http://127.0.0.1:1", "--name", "a/b")
    assert (result.exit_code, result.stderr) == (2, "error: --name a/b: must be letters, digits, '.', '_' and '-'\n")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "head:8265", "http://", "nonsense"])
def test_nobody_there_ends_with_4(project, address):
    result = invoke(project / "mine/trial.yaml", "--address", address)
    assert result.exit_code == 4
    assert result.stderr.startswith(f"error: no Ray job server answers at {address} within 10 s: ")


def test_silence_is_waited_for_a_bounded_time(monkeypatch):
    monkeypatch.setattr(submit, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ResourceError, match="no Ray job server"):
        submit.check_answers(f"http://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b"", "wants a token that this is not"),
        (403, b"", "wants a token that this is not"),
        (404, b"", r"is no Ray job server \(404\)"),
        (200, b"<html>", r"is no Ray job server \(200\)"),
        (200, b"[]", r"is no Ray job server \(200\)"),
    ],
)
def test_other_servers_are_told_from_ray(status, body, says):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ResourceError, match=says):
            submit.check_answers(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
