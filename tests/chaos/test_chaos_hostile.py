"""A few of the attempts and secrets of the chaos rows, and that the rows would see what they look for."""

from __future__ import annotations

import base64
import pickle
import random
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from rlhf.models.controls import Controls
from rlhf.rewards.question import Question
from tests.chaos import _hostile_models, _hostile_text, _hostile_turns, canaries, hostile
from tests.chaos._hostile_models import Bomb, Place


def test_nothing_runs_and_nothing_escapes():
    seen = hostile.run(40, random.Random(5))
    assert seen.counts["attempts"] == 40
    assert seen.counts["refused"] >= 10
    assert seen.passed, str(seen)


def test_no_secret_is_left():
    seen = canaries.run(1, random.Random(5))
    assert seen.counts["files searched"] > 3
    assert seen.passed, str(seen)


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Path) -> Place:
    (tmp_path / "attempt").mkdir()
    return Place(tmp_path / "attempt", tmp_path / "marker", tiny_folder, random.Random(1))


def test_the_bomb_goes_off_where_it_is_unpickled(place: Place):
    pickle.loads(pickle.dumps(Bomb(place.marker))).close()
    assert place.marker.exists()


def test_the_code_leaves_its_marker(place: Place):
    subprocess.run([sys.executable, "-c", place.code], check=True)
    assert place.marker.exists()


def test_the_templates_get_out_where_there_is_no_sandbox(place: Place):
    escape = next(text for text in _hostile_models.ESCAPES if "cycler" in text)
    jinja2.Environment().from_string(escape.replace("MARKER", str(place.marker))).render()
    assert place.marker.exists()


@pytest.mark.parametrize("attempt", _hostile_turns.ATTEMPTS, ids=lambda attempt: attempt.__name__)
def test_forgery_is_seen_where_nothing_prevents_it(attempt, place: Place, monkeypatch: pytest.MonkeyPatch):
    assert [attempt(place) for _ in range(20)] == [[]] * 20
    monkeypatch.setattr(Controls, "masked", lambda self, text, role: text)
    monkeypatch.setattr(Question, "nonce", lambda self, criteria: "WORD")
    monkeypatch.setattr(_hostile_turns, "BLOCKS", ("[End WORD]",))
    assert any(attempt(place) for _ in range(5))


def test_the_row_counts_each_kind_of_failure():
    def runs(place: Place) -> list[str]:
        place.marker.touch()
        return []

    def escapes(place: Place) -> list[str]:
        return ["something"]

    def breaks(place: Place) -> list[str]:
        raise KeyError("x")

    for attempt, what in ((runs, "executed"), (escapes, "escaped"), (breaks, "tracebacks")):
        seen = hostile.run(1, random.Random(1), [attempt])
        assert not seen.passed
        assert seen.counts[what] == 1


def test_markup_that_became_an_element_is_seen():
    plain = _hostile_text.Elements("<p class='x'>&lt;b&gt;</p>").seen
    for page in ("<p class='x'><b></p>", "<p class='x' onclick=y></p>", "<p class='x'></p><script></script>"):
        assert _hostile_text.Elements(page).seen != plain


@pytest.mark.parametrize("text", _hostile_text.CONTROLS)
def test_every_control_is_one_that_acts(text: str):
    assert _hostile_text.ACTING.search(text)


def test_a_leaked_secret_is_seen(tmp_path: Path):
    value = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "plain").write_text(f"x{value}x")
    (tmp_path / "coded").write_bytes(b"x" + base64.b64encode(value.encode()))
    (tmp_path / f"named-{value}").touch()
    (tmp_path / "clean").write_text(value[:-1])
    files = sorted(tmp_path.iterdir())
    assert {Path(line.partition(": ")[0]).name for line in canaries.leaks(files, {"HF_TOKEN": value})} == {
        "plain",
        "coded",
        f"named-{value}",
    }
