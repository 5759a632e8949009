"""`rlhf cache`: what is listed, what is removed, and what never is."""

import fcntl
import json
import os
import time

import pytest
from click.testing import CliRunner

from rlhf.cli import main
from rlhf.pruning import entries, remove, superfluous, sweep

HEX = "0123456789abcdef" * 4
DAY = 86400.0


def put(root, name, size, age_days):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    when = time.time() - age_days * DAY
    os.utime(path, (when, when))
    if path.parent.name.startswith("model-"):
        os.utime(path.parent, (when, when))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    monkeypatch.setenv("RLHF_CACHE", str(root))
    put(root, "models/model-aaaaaaaaaaaa/weights", 1000, 40)
    put(root, "models/model-bbbbbbbbbbbb/weights", 2000, 3)
    put(root, f"tokens/{HEX}.arrow", 400, 50)
    put(root, f"reference/{HEX}.json", 30, 1)
    put(root, "verdicts.sqlite", 7, 400)
    return root


def run(*options):
    return CliRunner().invoke(main, ["cache", *options])


def names(found):
    return sorted(entry.path.name for entry in found)


def test_entries_have_their_size_and_last_use(cache):
    found = {entry.path.name: entry for entry in entries(cache)}
    assert {name: entry.size for name, entry in found.items()} == {
        "model-aaaaaaaaaaaa": 1000,
        "model-bbbbbbbbbbbb": 2000,
        f"{HEX}.arrow": 400,
        f"{HEX}.json": 30,
        "verdicts.sqlite": 7,
    }
    assert (time.time() - found["model-aaaaaaaaaaaa"].used) / DAY == pytest.approx(40, abs=0.1)
    assert not any(entry.in_use for entry in found.values())


def test_the_list_says_it_all(cache):
    said = run().output
    for part in ("model-aaaaaaaaaaaa", "1000 B", "40 d ago", "verdicts.sqlite", "400 d ago", f"3.4 KiB in {cache}"):
        assert part in said
    rows = json.loads(run("--json").output)
    assert {row["kind"] for row in rows} == {"models", "tokens", "reference", "verdicts"}


def test_an_empty_cache_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "none"))
    assert "is empty" in run().output
    assert "nothing to remove" in run("prune", "--yes").output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("older_than", "max_bytes", "gone"),
    [
        (30 * DAY, None, [f"{HEX}.arrow", "model-aaaaaaaaaaaa"]),
        (2 * DAY, None, [f"{HEX}.arrow", "model-aaaaaaaaaaaa", "model-bbbbbbbbbbbb"]),
        (None, 3037, [f"{HEX}.arrow"]),
        (None, 3036, [f"{HEX}.arrow", "model-aaaaaaaaaaaa"]),
        (None, 0, [f"{HEX}.arrow", f"{HEX}.json", "model-aaaaaaaaaaaa", "model-bbbbbbbbbbbb"]),
        (45 * DAY, 3037, [f"{HEX}.arrow"]),
        (45 * DAY, 37, [f"{HEX}.arrow", "model-aaaaaaaaaaaa", "model-bbbbbbbbbbbb"]),
        (None, None, []),
        (1000 * DAY, None, []),
    ],
)
def test_the_least_recently_used_go_first_and_verdicts_stay(cache, older_than, max_bytes, gone):
    assert names(superfluous(entries(cache), older_than, max_bytes, time.time())) == sorted(gone)


def test_prune_removes_what_was_not_used_for_30_days_and_leaves_nothing_beside_it(cache):
    result = run("prune", "--yes")
    assert result.exit_code == 0, result.output
    assert "removed 2 entries, 1.4 KiB" in result.output
    assert names(entries(cache)) == [f"{HEX}.json", "model-bbbbbbbbbbbb", "verdicts.sqlite"]
    left = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert left == {"models/model-bbbbbbbbbbbb/weights", f"reference/{HEX}.json", "verdicts.sqlite"}


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--max-size", "2KiB"], 2),
        (["--max-size", "2 kb"], 3),
        (["--older-than", "2d"], 3),
        (["--older-than", "50h", "--max-size", "0"], 4),
        (["--older-than", "4w"], 2),
    ],
)
def test_amounts_have_units(cache, options, gone):
    before = len(entries(cache))
    assert run("prune", "--yes", *options).exit_code == 0
    assert len(entries(cache)) == before - gone


@pytest.mark.parametrize("option", [["--older-than", "30"], ["--older-than", "-1d"], ["--max-size", "20 apples"]])
def test_other_amounts_are_refused(cache, option):
    result = run("prune", "--yes", *option)
    assert result.exit_code == 2
    assert "is not a number with a unit" in result.stderr
    assert len(entries(cache)) == 5


def test_without_a_terminal_nothing_is_removed_unless_yes_is_given(cache):
    result = run("prune")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert len(entries(cache)) == 5


def test_what_was_used_since_it_was_listed_stays(cache):
    (listed,) = [entry for entry in entries(cache) if entry.path.name.startswith("model-a")]
    os.utime(listed.path)
    assert not remove(listed)
    assert listed.path.is_dir()


def test_names_that_are_not_its_own_and_links_are_left_alone(cache, tmp_path):
    """As where RLHF_CACHE names a home folder by mistake."""
    outside = put(tmp_path, f"outside/{HEX}.arrow", 10, 900)
    theirs = [
        put(cache, "thesis.tex", 10, 900),
        put(cache, "models/llama/weights", 10, 900),
        put(cache, "tokens/notes.txt", 10, 900),
        put(cache, "reference/.profile", 10, 900),
        put(cache, "tokens/tmpfile", 10, 900),
    ]
    (cache / "models" / "linked-cccccccccccc").symlink_to(outside.parent)
    (cache / "models" / "model-aaaaaaaaaaaa" / "data").symlink_to(outside.parent)
    before = len(entries(cache))
    assert run("prune", "--yes", "--max-size", "0").exit_code == 0
    assert before - len(entries(cache)) == 4
    assert all(path.exists() for path in (outside, *theirs, cache / "models" / "linked-cccccccccccc"))
    (cache / "tokens").rename(cache / "elsewhere")
    (cache / "tokens").symlink_to(outside.parent)
    assert names(entries(cache)) == ["verdicts.sqlite"]
    assert run("prune", "--yes", "--max-size", "0").exit_code == 0
    sweep(cache)
    assert outside.exists()


TEMPORARIES = (
    "models/.model-cccccccccccc.partial/weights",
    f"tokens/.{HEX}-0a1b2c3d.4711.partial",
    "tokens/tmpab12_cd3",
    f"reference/.{HEX}.json.4711",
    ".removed-x/never",
)


def test_temporaries_of_processes_that_ended_are_swept(cache):
    for name in TEMPORARIES[:-1]:
        put(cache, name, 10, 2)
    put(cache, "models/.removed-model-dddddddddddd-00/weights", 10, 0)
    put(cache, "models/.model-eeeeeeeeeeee.use", 0, 2)
    partial = cache / "models" / ".model-cccccccccccc.partial"
    os.utime(partial, (0, 0))
    before = names(entries(cache))
    assert len(sweep(cache)) == 6
    assert names(entries(cache)) == before
    left = {path.name for path in cache.rglob(".*")}
    assert left <= {".model-cccccccccccc.lock"}
    assert sweep(cache) == []


def test_temporaries_of_processes_that_live_stay(cache):
    """Those that are locked, and those that were written to a moment ago."""
    file = put(cache, TEMPORARIES[1], 10, 2)
    folder = put(cache, TEMPORARIES[0], 10, 2).parent
    os.utime(folder, (0, 0))
    young = [put(cache, f"tokens/.{HEX}-99.1.partial", 10, 0), put(cache, TEMPORARIES[2], 10, 0.5)]
    handles = [os.open(file, os.O_RDWR), os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)]
    for handle in handles:
        fcntl.flock(handle, fcntl.LOCK_EX)
    assert sweep(cache) == []
    assert all(path.exists() for path in (file, folder, *young))
    for handle in handles:
        os.close(handle)
    assert sorted(sweep(cache)) == sorted([file, folder])
