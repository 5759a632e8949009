"""What the source may not do, what a model folder may not hold, and what never reaches a log or a terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.errors import RecipeError
from rlhf.models.folder import check_folder
from rlhf.models.loading import load_causal
from rlhf.progress import Display
from rlhf.run_log import logged
from rlhf.untrusted import keep_secret, printable, redacted

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("rlhf", "actors") for path in (ROOT / package).rglob("*.py"))
SERIALISERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
PICKLES = {ROOT / "actors" / "objects.py", ROOT / "rlhf" / "data" / "workers.py"}
"""Values of this project on their way through Ray, which pickles by itself, and to a process that we started."""
EXECUTES = {ROOT / "rlhf" / "rewards" / "user_function.py"}
"""The process of its own that a reward function of the user's runs in."""
LOADERS = {"from_pretrained", "from_config", "LLM"}
CODELESS = ("GenerationConfig", "PeftModel")
"""These load settings, and adapters onto a model that is there: no code comes with them."""


def nodes(path: Path) -> Iterator[ast.AST]:
    yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_what_could_run(path: Path):
    for node in nodes(path):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {name.partition(".")[0] for name in names}
            assert path in PICKLES or not roots & SERIALISERS, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            owner = getattr(getattr(node.func, "value", None), "id", "")
            assert (owner, called(node)) not in {
                ("torch", "load"),
                ("np", "load"),
                ("numpy", "load"),
                ("torch", "save"),
            }
            assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"))
            assert path in EXECUTES or called(node) != "exec_module"
            assert not (owner == "os" and called(node) in ("system", "popen"))
        if isinstance(node, ast.keyword):
            on = isinstance(node.value, ast.Constant) and node.value.value is True
            assert not (node.arg in ("shell", "trust_remote_code", "allow_pickle") and on)


def test_every_model_is_loaded_without_code_of_its_own():
    calls = [
        (path, node)
        for path in SOURCES
        for node in nodes(path)
        if isinstance(node, ast.Call) and called(node) in LOADERS
        if not any(name in ast.dump(node.func) for name in CODELESS)
    ]
    assert len(calls) >= 6
    for path, node in calls:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | changes))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_model_that_wants_its_own_code_is_refused(model: Path, name: str):
    check_folder(model, "model.path: m")
    edit(model / name, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(RecipeError, match=rf"^model.path: m: .*{name} asks for code of the model's own \(auto_map\)"):
        check_folder(model, "model.path: m")


def test_code_of_a_part_of_a_model_is_seen(model: Path):
    edit(model / "config.json", text_config={"auto_map": {"AutoConfig": "x.Y"}})
    with pytest.raises(RecipeError, match="auto_map"):
        check_folder(model, "m")


def test_pickled_weights_are_named(model: Path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"no safetensors weights; pytorch_model\.bin may run code when it is read"):
        check_folder(model, "m")


def test_an_adapter_is_no_model(model: Path):
    edit(model / "adapter_config.json", base_model_name_or_path="x")
    with pytest.raises(RecipeError, match="merge it into its base first"):
        check_folder(model, "m")


@pytest.mark.parametrize("target", ["evil.bin", "../other.safetensors", "/x/y.safetensors", "", 3])
def test_an_index_of_weights_stays_in_its_folder(model: Path, target: object):
    index = model / "model.safetensors.index.json"
    edit(index, weight_map={"a": "model.safetensors"})
    check_folder(model, "m")
    edit(index, weight_map={"a": "model.safetensors", "b": target})
    with pytest.raises(RecipeError, match="no safetensors file in the folder"):
        check_folder(model, "m")


def test_what_a_library_raises_about_a_model_is_one_line(model: Path):
    (model / "model.safetensors").write_bytes(b"\x80\x04 no tensors")
    with pytest.raises(RecipeError, match="cannot be loaded: SafetensorError") as caught:
        load_causal(model, "float32")
    assert "\n" not in str(caught.value)


def test_secrets_are_known_by_name_or_because_they_were_read(monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "my_password", "OPENAI_API_KEY", "KEY"):
        monkeypatch.setenv(name, f"value-of-{name}")
    for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD_NAME", "RAY_AUTH_TOKEN_PATH", "SSL_KEY_FILE"):
        monkeypatch.setenv(name, f"plain-{name}")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    told = "value-of-HF_TOKEN value-of-AWS_SECRET_ACCESS_KEY value-of-my_password,value-of-OPENAI_API_KEY;value-of-KEY"
    assert redacted(told) == "*** *** ***,***;***"
    plain = "plain-TOKENIZERS_PARALLELISM plain-KEYBOARD_NAME plain-RAY_AUTH_TOKEN_PATH plain-SSL_KEY_FILE true"
    assert redacted(plain) == plain
    keep_secret("of-no-particular-name")
    assert redacted("x of-no-particular-name x") == "x *** x"


def test_a_secret_inside_another_is_gone_with_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    assert redacted("abcdefgh-and-more abcdefgh") == "*** ***"


def test_screen_and_log_hold_no_secret_and_nothing_that_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    screen = io.StringIO()
    with logged(tmp_path), Display(Console(file=screen, width=200)) as display:
        display.say("said hf_0123456789 \x1b[31m")
        logging.getLogger("rlhf").warning("warned %s", "hf_0123456789 \u202e")
        try:
            raise ValueError("raised hf_0123456789 \x9b2J")
        except ValueError:
            logging.getLogger("rlhf").info("failed", exc_info=True)
    assert screen.getvalue().splitlines() == ["said *** <U+001B>[31m", "warned *** <U+202E>"]
    log = (tmp_path / "logs" / "run.log").read_text()
    assert "ValueError: raised *** <U+009B>2J" in log
    assert "hf_0123456789" not in log


def test_what_is_long_is_cut_only_where_that_is_asked_for():
    assert printable("x" * 9000) == "x" * 9000
    assert printable("x" * 12, 10) == "x" * 10 + " ... (2 more characters)"


def test_a_group_of_processes_listens_on_loopback_alone():
    code = (
        "import psutil\nfrom rlhf.engines.ranks import join_alone\njoin_alone()\n"
        "found = [c.laddr.ip for c in psutil.Process().net_connections('inet') if c.status == 'LISTEN']\n"
        "print(len(found) > 0, set(found) - {'127.0.0.1', '::1'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True set()"
