"""Recipes, reports, terminals and servers given text that tries to act; each says what it got past."""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from rich.console import Console

from rlhf.cli import main
from rlhf.errors import RlhfError
from rlhf.progress import Display
from rlhf.recipe.base import HttpJudge
from rlhf.recipe.load import load_recipe
from rlhf.recipe.upload import collect
from rlhf.report.html import write_html
from rlhf.report.samples import CandidateSamples, Sample, Samples
from rlhf.report.statistics import compare
from rlhf.report.table import comparison_table
from rlhf.rewards.remote import HttpReward
from rlhf.run_log import logged
from rlhf.types import Prompt, Rollout
from tests.chaos._hostile_models import Attempt, Place
from tests.rewards.local_server import Answer, LocalServer

MARKUP = (
    "<script>document.title='ran'</script>",
    "</script><script>x()</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<a href='javascript:alert(1)' onclick=x()>x</a>",
    "\"><iframe src='https://evil.example'></iframe>",
    "' autofocus onfocus=alert(1) x='",
    "</textarea></style></title><base href='https://evil.example/'>",
    "<!--<script>--><meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<link rel=stylesheet href=https://evil.example/x.css><form action=https://evil.example><button>",
    "{{ ''.__class__ }}{% for x in y %}",
)
CONTROLS = (
    "\x1b[2J\x1b[1;1H", "\x1b]0;title\x07", "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "\x1b]52;c;ZXZpbA==\x07", "\x9b31m", "\x9d0;x\x9c", "\x1bP$q\x1b\\", "a\rb", "a\x08\x08b", "\x7f", "\u202egpj.exe",
    "\u2066\u2069", "\u200b\u2060\ufeff",
    "\U000e0041\U000e0042", "\u2028", "\x85", "\x00",
)  # fmt: skip
ACTING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)
RECIPE = """\
name: NAME
model: {path: "tiny://llama", dtype: float32}
stages:
  - {name: STAGE, kind: sft, data: {path: rows.jsonl}}
"""


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and where links lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, ...]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        links = [value or "" for name, value in attributes if name in ("src", "href", "action", "http-equiv")]
        self.seen.append((tag, *(name for name, _ in attributes), *links))


def _report(folder: Path, text: str) -> str:
    rows = [Sample(f"p{i}", text, text, float(i % 3), 0.5, 0.1, 5, "stop", 1.0) for i in range(12)]
    candidates = [
        CandidateSamples("sft", "sft", Samples.of(rows)),
        CandidateSamples(f"ppo {text}", "ppo", Samples.of(replace(row, gold=row.gold + 1) for row in rows)),
    ]
    recipes: dict[str, Any] = {f"a {text}": {"seed": text}, "b": {"seed": "1", text: "2"}}
    curves = {"ppo": [{"step": float(i), "loss": 1.0, text: float(i)} for i in range(1, 4)]}
    path = folder / "report.html"
    comparison = compare(candidates, "sft", 5, 100)
    write_html(path, comparison, curves, candidates, {"f": text, text: "f"}, recipes=recipes, environment={"x": text})
    return path.read_text(encoding="utf-8").replace(_plotly(), "")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def report(place: Place) -> list[str]:
    """Markup in every text of the report: its elements must be those of a page about nothing."""
    text = place.rng.choice(MARKUP) + place.rng.choice(CONTROLS) + place.rng.choice(MARKUP)
    page = _report(place.folder, text)
    found = [] if Elements(page).seen == Elements(_report(place.folder, "fine")).seen else ["markup became elements"]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    if policy is None or "default-src 'none'" not in policy[1] or re.search("script-src[^;]*unsafe", policy[1]):
        found.append("no content-security policy")
    return found


def _acts(what: str, printed: str) -> list[str]:
    return [f"{what} shows {found[0]!a}"] if (found := ACTING.search(printed)) else []


def terminal(place: Place) -> list[str]:
    """Control sequences in what a run prints and logs: warnings, errors, tracebacks, tables."""
    text = "".join(place.rng.sample(CONTROLS, 3))
    screen = io.StringIO()
    with logged(place.folder), Display(Console(file=screen, width=200)) as display:
        display.say(text)
        log = logging.getLogger("rlhf")
        log.warning("column %s", text)
        try:
            raise ValueError(text)
        except ValueError:
            log.info("failed", exc_info=True)
    rows = Samples.of(Sample(f"p{i}", text, text, 1.0, None, 0.1, 5, "stop", 1.0) for i in range(12))
    comparison = compare([CandidateSamples(text, "sft", rows), CandidateSamples("x", "x", rows)], text, 5, 100)
    Console(file=screen, width=200).print(comparison_table(comparison))
    log_text = (place.folder / "logs" / "run.log").read_text(encoding="utf-8")
    return _acts("the screen", screen.getvalue()) + _acts("run.log", log_text)


def command_line(place: Place) -> list[str]:
    """Control sequences in data, names of files and recipes, shown by commands, with --debug too."""
    text = place.rng.choice([part for part in CONTROLS if "\x00" not in part])
    rows, name = place.folder / "rows.jsonl", text.replace("/", "")
    rows.write_text(json.dumps({text: text, "prompt": 3}) + "\n" + json.dumps({"prompt": text}) + "\n")
    odd = place.folder / f"{name}.yaml"
    odd.write_text(RECIPE.replace("NAME", json.dumps(text)).replace("STAGE", "sft") + f"{json.dumps(text)}: 1\n")
    state = place.folder / "run" / "stages" / f"s{name}" / "state" / "step-00000001"
    state.mkdir(parents=True)
    (state / f"x{name}").write_text("x")
    said = []
    run = str(place.folder / "run")
    for arguments in (
        ["data", "inspect", str(rows), "--debug"],
        ["validate", str(odd), "--debug"],
        ["checkpoint", "list", run],
        ["checkpoint", "verify", run],
        ["compare", run, "-o", str(place.folder / "r.html"), "--debug"],
    ):
        result = CliRunner().invoke(main, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        said += _acts(arguments[0], result.output)
    return said


def names(place: Place) -> list[str]:
    """Names that become folders lead out of the run."""
    bad = place.rng.choice(("../x", "a/../../x", "/tmp/x", "..", ".", "x/y", "~", "a\\..\\b", "x\x00y", "", "-x"))
    text = RECIPE.replace("NAME", "trial").replace("STAGE", "sft")
    text = place.rng.choice(
        (
            RECIPE.replace("NAME", json.dumps(bad)).replace("STAGE", "sft"),
            RECIPE.replace("NAME", "trial").replace("STAGE", json.dumps(bad)),
            f"{text}checkpoints: {{{json.dumps(bad)}: 'tiny://llama'}}\n",
        )
    )
    (place.folder / "rows.jsonl").write_text("{}\n")
    (place.folder / "r.yaml").write_text(text)
    load_recipe(place.folder / "r.yaml")
    return ["a name that leads elsewhere was taken"]


def yaml(place: Place) -> list[str]:
    """YAML that constructs objects or grows: in a recipe, in what it extends, on the command line."""
    command = f"touch {place.marker}"
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12))
    evil = place.rng.choice(
        (
            f"seed: !!python/object/apply:os.system ['{command}']",
            f"seed: !!python/object/new:subprocess.Popen [['touch', '{place.marker}']]",
            "seed: !!python/name:os.system",
            "seed: !!python/module:os",
            f"seed: !<tag:yaml.org,2002:python/object/apply:os.system> ['{command}']",
            "%TAG ! tag:yaml.org,2002:python/\n---\nseed: !name:os.system x",
            laughs,
            "a: &a [*a]",
            "x: " + "[" * 5000,
            "x: " + "{a: " * 5000,
        )
    )
    good = RECIPE.replace("NAME", "trial").replace("STAGE", "sft")
    (place.folder / "rows.jsonl").write_text("{}\n")
    base, recipe = place.folder / "base.yaml", place.folder / "r.yaml"
    if place.rng.random() < 0.5:
        base.write_text(f"{evil}\n{good}")
        recipe.write_text("extends: base.yaml\n")
        load_recipe(recipe)
    else:
        recipe.write_text(good)
        load_recipe(recipe, [f"seed={evil.removeprefix('seed: ')}"])
    return ["YAML that constructs objects was taken"]


def upload(place: Place) -> list[str]:
    """Files beside, above and behind links of a recipe: names in the archive must stay where it is unpacked."""
    inner = place.folder / "a" / "b"
    inner.mkdir(parents=True)
    (place.folder / "private").write_text('{"prompt": "x"}\n')
    (place.folder / "rows.jsonl").write_text('{"prompt": "x"}\n')
    (inner / "rows.jsonl").symlink_to(place.folder / "private")
    path = place.rng.choice(
        ("../../rows.jsonl", "rows.jsonl", str(place.folder / "rows.jsonl"), "x/../../../rows.jsonl")
    )
    text = RECIPE.replace("NAME", "trial").replace("STAGE", "sft").replace("rows.jsonl", path)
    (inner / "r.yaml").write_text(text)
    made = collect(load_recipe(inner / "r.yaml"))
    made.write(place.folder / "x.zip")
    with zipfile.ZipFile(place.folder / "x.zip") as archive:
        inside = archive.infolist()
    odd = [e.filename for e in inside if e.filename.startswith("/") or ".." in Path(e.filename).parts]
    return [f"the archive holds {odd}"] * bool(odd) + ["a link"] * any(e.external_attr >> 28 == 0xA for e in inside)


def _answers(place: Place) -> Iterator[Answer]:
    text = "".join(place.rng.sample(CONTROLS, 3)) + place.rng.choice(MARKUP)
    packed = {"Content-Encoding": place.rng.choice(("gzip", "deflate", "br", "zstd"))}
    yield Answer(gzip.compress(b" " * 2**24 + b'{"scores": [0]}'), headers=packed)
    yield Answer({"error": text}, status=400)
    yield Answer({"scores": [text]})
    yield Answer(b'{"scores": ' + b"[" * 100_000)
    yield Answer(b"", status=302, headers={"Location": "file:///etc/passwd"})
    yield Answer(b"\x80\x04\x95cposix\nsystem\n")


def server(place: Place) -> list[str]:
    """A reward server answers with a bomb, a redirect, deep JSON, or text that acts."""
    answer = place.rng.choice(list(_answers(place)))
    rollout = Rollout(Prompt("p", (1,), "x", {}), (2,), (0.0,), "y", "stop", 0, 0)
    with LocalServer(lambda number, body: answer) as local:
        judge = HttpReward(HttpJudge(kind="http", url=local.url, timeout_s=5, deadline_s=5))
        try:
            scores = judge.score([rollout]).result()
        except RlhfError as error:
            return _acts("the error", str(error))
    return [f"scores {scores.tolist()}"] if torch.is_tensor(scores) else []


ATTEMPTS: tuple[Attempt, ...] = (report, terminal, command_line, names, yaml, upload, server, terminal)
