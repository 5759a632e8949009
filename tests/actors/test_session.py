"""What a run's own Ray leaves in the temporary folder: nothing, however the run ends."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.session import LOCK, PREFIX, OwnSession


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.delenv("RLHF_KEEP_RAY_LOGS", raising=False)
    yield folder
    shutil.rmtree(folder)


def fill(folder: Path) -> None:
    """Write what Ray writes: a session, a link to it, logs."""
    logs = folder / "session_2026-01-01_00-00-00_000000_1" / "logs"
    logs.mkdir(parents=True)
    (folder / "session_latest").symlink_to(logs.parent)
    (logs / "worker-a-1.err").write_text(
        ":job_id:01\n:actor_name:Learner\n" + "".join(f"line {n}\n" for n in range(99))
    )
    (logs / "worker-b-2.err").write_text(":job_id:01\n:actor_name:Learner\n")
    (logs / "raylet.out").write_text("raylet says this\n")
    (logs / "gcs_server.err").write_text("")


def test_it_is_made_in_the_temporary_folder_for_this_user_alone_and_removed(root):
    session = OwnSession()
    assert list(root.iterdir()) == []
    folder = session.make()
    assert folder.parent == root
    assert folder.stat().st_mode & 0o077 == 0
    fill(folder)
    session.remove(failed=False)
    session.remove(failed=False)
    assert list(root.iterdir()) == []


def test_a_cluster_that_is_joined_has_none(root):
    OwnSession().remove(failed=True)
    assert list(root.iterdir()) == []


def test_of_a_run_that_failed_the_end_of_the_logs_is_kept(root, caplog):
    session = OwnSession()
    fill(session.make())
    with caplog.at_level(logging.INFO, logger="rlhf"):
        session.remove(failed=True)
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [
        "the end of Ray's raylet.out:\nraylet says this",
        "the end of Ray's worker-a-1.err:\n" + "\n".join(f"line {n}" for n in range(79, 99)),
    ]
    assert list(root.iterdir()) == []


def test_it_stays_where_the_environment_asks_for_that_and_says_where(root, caplog, monkeypatch):
    monkeypatch.setenv("RLHF_KEEP_RAY_LOGS", "1")
    session = OwnSession()
    folder = session.make()
    session.remove(failed=False)
    assert folder.is_dir()
    assert [record.getMessage() for record in caplog.records] == [
        f"Ray's logs stay in {folder}, as RLHF_KEEP_RAY_LOGS says"
    ]


def test_those_of_runs_that_were_killed_go_with_the_next_start_and_no_others(root):
    alive = OwnSession()
    living, young, killed, other = alive.make(), root / f"{PREFIX}young", root / f"{PREFIX}killed", root / "mine"
    for folder in (young, killed, other):
        folder.mkdir()
        (folder / LOCK).touch()
    (root / f"{PREFIX}link").symlink_to(other)
    fill(killed)
    for folder in (living, killed, other):
        os.utime(folder, (0, 0))
    os.utime(root / f"{PREFIX}link", (0, 0), follow_symlinks=False)
    session = OwnSession()
    made = session.make()
    assert {path.name for path in root.iterdir()} == {
        living.name, young.name, other.name, made.name, f"{PREFIX}link"
    }  # fmt: skip
    assert (other / LOCK).exists()
    for one in (alive, session):
        one.remove(failed=False)


def test_a_path_too_long_for_sockets_is_not_used(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    session = OwnSession()
    assert session.make().parent == Path("/tmp")
    session.remove(failed=False)
    assert list(deep.iterdir()) == []
