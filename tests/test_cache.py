"""What a process uses of the cache is held until it ends."""

import fcntl
import os
import subprocess
import sys
import threading

import pytest

from rlhf import cache
from rlhf.cache import hold, use_lock
from rlhf.errors import ResourceError
from rlhf.models import cache as cache_module
from rlhf.models.cache import held_model
from rlhf.pruning import entries, remove

HOLDER = """\
import sys
from pathlib import Path
from rlhf.cache import hold
assert hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def entry(tmp_path):
    folder = tmp_path / "models" / "model-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(100))
    os.utime(folder, (1000, 1000))
    return folder


@pytest.fixture(autouse=True)
def let_go():
    """Let go of what a test holds, as the end of a process does."""
    yield
    while cache._held:
        os.close(cache._held.popitem()[1])


def test_an_entry_is_in_use_until_its_process_ends_however_it_does(entry, tmp_path):
    command = [sys.executable, "-c", HOLDER, str(entry)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        (listed,) = entries(tmp_path)
        assert listed.in_use
        assert listed.used > 1000
        assert not remove(listed)
        assert (entry / "weights").exists()
        process.kill()
    (listed,) = entries(tmp_path)
    assert not listed.in_use
    assert remove(listed)
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_not_there_cannot_be_held(tmp_path):
    assert not hold(tmp_path / "models" / "model-0123456789ab")
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_is_removed_in_that_instant_is_built_again(tmp_path, monkeypatch):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "weights").write_text("whole")

    first = held_model(tmp_path, "model", "key", build)
    let_go_of = cache._held.pop(first)
    os.close(let_go_of)
    (listed,) = entries(tmp_path)
    found = [first]

    def once_stale(*arguments):
        """Find the entry, which pruning then removes before it can be held."""
        if found:
            folder = found.pop()
            assert remove(listed)
            return folder
        return real(*arguments)

    real = cache_module.build_once
    os.utime(first, (listed.used, listed.used))
    monkeypatch.setattr(cache_module, "build_once", once_stale)
    again = held_model(tmp_path, "model", "key", build)
    assert again == first
    assert (again / "weights").read_text() == "whole"
    assert len(built) == 2
    assert entries(tmp_path)[0].in_use


def test_it_waits_while_pruning_has_the_lock_and_no_longer_than_it_says(entry, monkeypatch):
    handle = os.open(use_lock(entry), os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(cache, "PRUNED_S", 0.1)
    with pytest.raises(ResourceError, match=f"{entry} is being removed by another process"):
        hold(entry)
    monkeypatch.setattr(cache, "PRUNED_S", 600)
    held = threading.Thread(target=hold, args=(entry,))
    held.start()
    os.close(handle)
    held.join(60)
    assert entry in cache._held


def test_a_lock_file_that_was_removed_meanwhile_holds_nothing(entry):
    stale = os.open(use_lock(entry), os.O_RDWR | os.O_CREAT)
    use_lock(entry).unlink()
    assert not cache._shared(stale, use_lock(entry))
    os.close(stale)
