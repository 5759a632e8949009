"""What a command says before it has anything to show."""

import subprocess
import sys

from rlhf.waiting import waiting

FIRST = """
import sys
from rlhf import cli
heavy = lambda: sorted({"torch", "transformers", "ray", "datasets"} & set(sys.modules))
seen = cli.echo
cli.echo = lambda text, **options: (seen(f"{text} {heavy()}", **options))
sys.argv = ["rlhf", "run", "recipe.yaml", "--local", "--set", "stages.sft.data.path=recipe.yaml"]
cli.main()
"""
RECIPE = """\
name: one
model: {path: "tiny://llama"}
stages:
  - {name: sft, kind: sft, data: {path: recipe.yaml}}
"""


def test_a_run_says_what_it_does_before_anything_large_is_imported(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    ended = subprocess.run([sys.executable, "-c", FIRST], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[0] == "one: reading the model and the data []"


def test_it_is_quiet_where_nobody_watches(capsys):
    with waiting("loading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_it(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with waiting("loading [bold]m[/bold]"):
        pass
    found = capsys.readouterr()
    assert "loading [bold]m[/bold]" in found.err
    assert found.out == ""
