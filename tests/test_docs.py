"""The documentation says what is so: links, recipes, commands, the reference and the diagnoses."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

import rlhf.errors
from rlhf.cli import main
from rlhf.recipe.load import load_recipe
from rlhf.recipe.schema import Recipe
from rlhf.recipe.tuning_support import SUPPORT

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "pages").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = ("chats.jsonl", "prompts.jsonl", "more.jsonl", "heldout.jsonl", "table.csv", "judge.py")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Yield the fenced blocks of a language, with the page's name and a number."""
    for page in PAGES:
        for number, (said, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
            if said == language:
                yield f"{page.stem}-{number}", text


def commands() -> list[str]:
    return [line for _, text in blocks("") for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_reference", DOCS / "recipe_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_builds_and_every_link_leads_somewhere(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(config_file=str(DOCS / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    build(config)  # strict: raises Abort at the first warning
    assert (tmp_path / "site" / "index.html").is_file()
    built = {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404"}
    assert built == {page.stem for page in PAGES} | {"search"}
    for page in (tmp_path / "site").glob("*.html"):  # no fonts, scripts or pictures from another host
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=.(https?:)?//", page.read_text(encoding="utf-8"))


def test_the_reference_is_what_the_schema_says(reference):
    assert (DOCS / "pages" / "recipe.md").read_text(encoding="utf-8") == reference.page(), (
        "run: python docs/recipe_reference.py"
    )
    assert set(Recipe.model_json_schema()["$defs"]) <= reference.documented()


def test_the_reference_has_every_key_with_its_default(reference):
    page = reference.page()
    assert "| `clip_range` | number above 0 | `0.2` |" in page
    assert "| `optimizer` | [`optimizer`](#optimizer) | `{learning_rate: 1e-05, schedule: constant}` |" in page
    assert "| `name` | text | required |" in page
    for name in Recipe.model_fields:
        assert f"| `{name}` |" in page
    anchors = set(re.findall(r"\{#(\w+)\}", page))
    assert set(re.findall(r"\(#(\w+)\)", page)) - anchors <= {"data", "judges"}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in blocks("yaml")])
def test_recipes_in_the_pages_are_valid(text, tmp_path):
    """A fragment is laid over the whole recipe of the page on concepts."""
    for name in FILES:
        (tmp_path / name).write_text("")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    whole = next(block for name, block in blocks("yaml") if name.startswith("concepts"))
    (tmp_path / "mine.yaml").write_text(whole)
    own = text if re.search(r"^(extends|name):", text, re.MULTILINE) else f"extends: mine.yaml\n{text}"
    (tmp_path / "recipe.yaml").write_text(own)
    assert load_recipe(tmp_path / "recipe.yaml").recipe.stages


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_in_the_pages_exist(line):
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] != "rlhf":
        assert (ROOT / words[0]).is_file()
        return
    _check_command(words[1:])


def test_commands_in_the_tables_exist():
    said = {shown for page in PAGES for shown in re.findall(r"`rlhf ([a-z][^`]*)`", page.read_text(encoding="utf-8"))}
    assert len(said) > 10
    for text in said:
        _check_command(shlex.split(text))


def _check_command(words: list[str]) -> None:
    command: click.Command = main
    while isinstance(command, click.Group) and (words or not command.invoke_without_command):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= {*known, "--help"}


def test_files_in_the_pages_exist():
    names = r"`((?:recipes|docs|cluster)/[\w./-]+)`"
    said = {path for page in PAGES for path in re.findall(names, page.read_text(encoding="utf-8"))}
    assert said
    assert [path for path in said if not (ROOT / path).exists()] == []


def test_every_diagnosis_and_exit_code_is_in_the_page_on_trouble():
    page = (DOCS / "pages" / "troubleshooting.md").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "rlhf" / "report" / "diagnosis.py").read_text(encoding="utf-8"))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Diagnosis"
    ]
    names = {node.args[0].value for node in calls if node.args and isinstance(node.args[0], ast.Constant)}
    assert len(names) >= 9
    for name in names:
        assert f"| {name} |" in page, name
    errors = [kind for kind in vars(rlhf.errors).values() if isinstance(kind, type)]
    index = (DOCS / "pages" / "index.md").read_text(encoding="utf-8")
    for code in {error.exit_code for error in errors if hasattr(error, "exit_code")}:
        assert f"| {code} |" in index


def test_the_figures_of_the_comparison_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (DOCS / "pages" / "choosing.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| ([\w ]+) \| (\S+ \[[^]]+\]) \|", page, re.MULTILINE):
        assert f"| {row[0]} | {row[1]} |" in readme


def test_every_tuning_method_is_in_its_page():
    page = (DOCS / "pages" / "tuning.md").read_text(encoding="utf-8")
    mapping = Recipe.model_json_schema()["properties"]["tuning"]["discriminator"]["mapping"]
    rows = {
        kind: [cell.strip() for cell in rest.split("|")]
        for kind, rest in re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.M)
    }
    del rows["kind"]
    assert set(rows) == set(mapping) == set(SUPPORT)
    for kind, cells in rows.items():
        can = SUPPORT[kind]
        assert cells[-3:] == ["yes" if able else "no" for able in (can.merges, can.reference, can.cut)], kind


def test_every_format_is_in_the_page_on_data():
    page = (DOCS / "pages" / "data.md").read_text(encoding="utf-8")
    formats = Recipe.model_json_schema()["$defs"]["PathData"]["properties"]["format"]["enum"]
    assert [name for name in formats if f"`{name}`" not in page and name != "auto"] == []


def test_the_notebook_has_no_outputs():
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
