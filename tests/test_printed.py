"""Nothing that comes from outside reaches a terminal or a log raw: one way out for texts, one console, one logger."""

from __future__ import annotations

import ast
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table

from rlhf.terminal import Terminal
from rlhf.untrusted import PrintableRecords, echo

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("rlhf", "actors") for path in (ROOT / package).rglob("*.py"))
HOSTILE = "a\x1b]0;title\x07\x1b[2J\x1b]52;c;aGk=\x07\u202eb\x9b31m [bold]c[/bold] [link=https://x]d[/link] [/] :smile:"
SPELT = (
    "a<U+001B>]0;title<U+0007><U+001B>[2J<U+001B>]52;c;aGk=<U+0007><U+202E>b<U+009B>31m"
    " [bold]c[/bold] [link=https://x]d[/link] [/] :smile:"
)
PRINTS = {"print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write", "rich.print", "pprint"}
CONSOLES = {"Console", "rich.get_console", "get_console"}
READS_MARKUP = {"status", "rule", "from_markup", "from_ansi", "Spinner", "Rule", "input", "out", "render_str"}
"""What rich takes a text for markup in (or writes past `render`), whatever its console says."""
ALLOWED = {
    ("rlhf/untrusted.py", "click.echo"): "the one way out",
    ("rlhf/terminal.py", "Console"): "the one console",
    ("actors/head.py", "sys.stderr.write"): "host and port, and words of ours",
}


def name_of(node: ast.expr) -> str:
    """Return a dotted name, with a dot before it where it is a method of something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def literal(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Call) and name_of(node.func) == "Text")


def faults(source: str, path: str) -> Iterator[str]:
    """Yield what in a file could print a text from outside raw."""
    tree = ast.parse(source)
    levels = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and "evel" in node.attr}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, plain = name_of(node.func), all(map(literal, node.args))
        last = name.rpartition(".")[2]
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        place = f"{path}:{node.lineno}: {name}"
        if (path, name) in ALLOWED:
            continue
        if name in PRINTS and not plain:
            yield f"{place} instead of rlhf.untrusted.echo"
        if name in CONSOLES or (last == "Console" and name.startswith("rich")):
            yield f"{place} instead of rlhf.terminal.Terminal"
        if last in READS_MARKUP and not plain and name not in ("input", "ast.literal_eval") and "console" in place:
            yield f"{place} reads markup in its text: give it a Text"
        if last in ("from_markup", "from_ansi", "Spinner", "Rule") and not plain:
            yield f"{place} reads markup in its text: give it a Text"
        if last == "Panel" and not all(literal(keywords[key]) for key in ("title", "subtitle") if key in keywords):
            yield f"{place} reads markup in its title: give it a Text"
        wants_markup = keywords.get("markup")
        if last == "TextColumn" and "{" in ast.dump(node.args[0]) and wants_markup is None:
            yield f"{place} reads markup in what it shows: markup=False"
        if isinstance(wants_markup, ast.Constant) and wants_markup.value:
            yield f"{place} asks for markup"
        if last == "getLogger" and id(node) not in levels and name_of(node.func) != "self.getLogger":
            known = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == "rlhf"
            if not known:
                yield f"{place} of a logger without the filter that makes records printable: use 'rlhf'"
        if name in ("sys.exit", "SystemExit") and any(isinstance(arg, ast.JoinedStr) for arg in node.args):
            yield f"{place} prints its text raw"
        if name in ("warnings.warn", "rich.inspect", "traceback.print_exc"):
            yield f"{place} prints past everything"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_goes_the_one_way(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())) == []


@pytest.mark.parametrize(
    "line",
    [
        "print(model.id)",
        "click.echo(f'{name}: ready')",
        "sys.stderr.write(text)",
        "console = Console(highlight=False)",
        "with self.console.status(f'{name} ...'): pass",
        "self.console.out(text)",
        "Panel(text, title=name)",
        "Text.from_markup(answer)",
        "TextColumn('{task.description}')",
        "console.print(text, markup=True)",
        "log = logging.getLogger(__name__)",
        "sys.exit(f'no {name}')",
    ],
)
def test_the_check_finds_what_it_looks_for(line: str) -> None:
    assert list(faults(line, "rlhf/new.py"))


def test_echo_spells_out_what_acts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "longsecretvalue")
    echo(f"{HOSTILE} longsecretvalue")
    echo(HOSTILE, err=True)
    said = capsys.readouterr()
    assert said.out == f"{SPELT} ***\n"
    assert said.err == f"{SPELT}\n"


@pytest.mark.parametrize("colours", [False, True])
def test_no_renderable_brings_it_past_the_console(colours: bool) -> None:
    out = io.StringIO()
    console = Terminal(file=out, width=400, force_terminal=colours, color_system="truecolor" if colours else None)
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    for thing in (HOSTILE, table, Panel(HOSTILE)):
        console.print(thing)
    console.print(HOSTILE, style="bold", soft_wrap=True)
    said = out.getvalue()
    flat = re.sub(r"\x1b\[[0-9;]*m|\s", "", said)  # titles are wrapped
    assert flat.count(re.sub(r"\s", "", SPELT)) == 7
    assert not {"\x07", "\x9b", "\u202e"} & set(said)
    assert "\x1b]" not in said
    assert "\x1b[2J" not in said
    assert ("\x1b[" in said) == colours


def test_records_are_printable_with_their_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    handler, log = logging.StreamHandler(out), logging.getLogger("rlhf")
    assert any(isinstance(one, PrintableRecords) for one in log.filters)
    log.addHandler(handler)
    try:
        log.warning("%s failed at %d", HOSTILE, 3)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("this")
    finally:
        log.removeHandler(handler)
    said = out.getvalue()
    assert said.startswith(f"{SPELT} failed at 3\nthis\nTraceback ")
    assert f"ValueError: {SPELT}" in said
    assert "\x1b" not in said


def test_a_library_users_log_is_printable_without_any_handler() -> None:
    code = "import logging, rlhf; logging.getLogger('rlhf').warning('a%s', chr(27) + '[2Jb')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "a<U+001B>[2Jb\n"
