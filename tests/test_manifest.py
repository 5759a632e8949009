"""Manifests and seals: what is said of a folder, and every difference from it."""

import errno
import hashlib
import json
import os
import resource
import shutil

import pytest

from rlhf.checkpoint import broken, newest, problems, seal, write
from rlhf.errors import ResourceError
from tests.small_states import ABC, NOTHING, fill, limited, names, save


def forge(folder, **changes):
    """Change a manifest as one could who knows how its own hash is made."""
    content = json.loads((folder / "manifest.json").read_text()) | changes
    del content["sha256"]
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def test_a_manifest_says_what_is_there(tmp_path):
    saved = write(tmp_path / "a" / "state", 12, "key", fill, {"loss": 0.1 + 0.2, 3: [None, "é"]})
    assert saved.folder == tmp_path / "a" / "state" / "step-00000012"
    assert saved.info == {"loss": 0.1 + 0.2, "3": [None, "é"]}
    assert newest(tmp_path / "a" / "state") == saved
    assert problems(saved.folder) == []
    content = json.loads((saved.folder / "manifest.json").read_text())
    assert content["files"] == {"sub/abc": {"size": 3, "sha256": ABC}, "empty": {"size": 0, "sha256": NOTHING}}
    assert (content["format"], content["step"], content["key"]) == (1, 12, "key")
    forge(saved.folder)  # the same content gives the same own hash
    assert newest(tmp_path / "a" / "state") == saved


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda at: (at / "sub" / "abc").write_bytes(b"ab"), "sub/abc: truncated: 2 of 3 bytes"),
        (lambda at: (at / "sub" / "abc").write_bytes(b"abcd"), "sub/abc: grown: 4 of 3 bytes"),
        (lambda at: (at / "sub" / "abc").write_bytes(b"abd"), "sub/abc: changed"),
        (lambda at: (at / "empty").unlink(), "empty: missing"),
        (lambda at: ((at / "empty").unlink(), (at / "empty").mkdir()), "empty: not a file"),
        (lambda at: ((at / "empty").unlink(), os.mkfifo(at / "empty")), "empty: not a file"),
        (lambda at: shutil.rmtree(at / "sub"), "sub/abc: missing"),
        (lambda at: (shutil.rmtree(at / "sub"), (at / "sub").touch()), "sub/abc: missing"),
        (lambda at: ((at / "empty").unlink(), (at / "empty").symlink_to("/dev/null")), "empty: a symbolic link"),
        (lambda at: ((at / "sub").rename(at / "x"), (at / "sub").symlink_to("x")), "sub/abc: behind a symbolic link"),
        (lambda at: (at / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda at: (at / "manifest.json").write_bytes(b"{}"), "manifest.json: changed since it was written"),
        (lambda at: (at / "manifest.json").write_bytes(b"[" * 100_000), "manifest.json: truncated or damaged"),
        (lambda at: (at / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: truncated or damaged"),
        (lambda at: os.truncate(at / "manifest.json", 100), "manifest.json: truncated or damaged"),
        (lambda at: ((at / "manifest.json").unlink(), os.mkfifo(at / "manifest.json")), "manifest.json: truncated or"),
        (lambda at: ((at / "manifest.json").unlink(), (at / "manifest.json").mkdir()), "manifest.json: cannot be read"),
        (lambda at: forge(at, step=6), "manifest.json: of step 6, in a folder named step-00000005"),
        (lambda at: forge(at, format=2), "manifest.json: format 2, this version reads 1"),
        (lambda at: forge(at, files=[]), "manifest.json: files is missing or of another type"),
        (lambda at: forge(at, files={"../x": {}, "sub/abc": {}, "empty": {}}), "../x: the path leaves the folder"),
        (lambda at: forge(at, files={"/dev/zero": {}}), "/dev/zero: the path leaves the folder"),
        (lambda at: forge(at, files={"a\0b": {}}), "'a\\x00b': the path leaves the folder"),
        (lambda at: forge(at, files={"\x1b[2J": {"size": 0}}), "'\\x1b[2J': missing"),
        (lambda at: forge(at, files={"sub/abc": 3, "empty": {}}), "sub/abc: sealed with neither size nor sha256"),
    ],
)
def test_every_difference_is_told_and_set_aside(tmp_path, caplog, damage, said):
    older = save(tmp_path, 4)
    state = save(tmp_path, 5).folder
    damage(state)
    assert said in "\n".join(problems(state))
    assert newest(tmp_path, "k") == older
    assert names(tmp_path) == ["quarantine-step-00000005", "step-00000004"]
    [record] = caplog.records
    assert (record.name, record.levelname) == ("rlhf", "WARNING")
    assert str(state) in record.getMessage()


def hidden(folder):
    """Put a folder beside the files that nobody may read."""
    (folder / "lost+found").mkdir(mode=0)


@pytest.mark.parametrize(
    "add",
    [
        lambda at: (at / "NOTES.txt").write_text("good one"),
        lambda at: (at / "sub" / ".nfs0001").write_bytes(b""),
        lambda at: (at / ".DS_Store").write_bytes(b"\0"),
        lambda at: (at / "pytorch_model.bin").write_bytes(b"pickle"),
        lambda at: (at / "link").symlink_to(at / "sub"),
        lambda at: (at / "nowhere").symlink_to("/nowhere"),
        lambda at: os.mkfifo(at / "pipe"),
        hidden,
    ],
)
def test_what_is_not_sealed_is_no_damage(tmp_path, caplog, add):
    state = save(tmp_path, 5)
    add(state.folder)
    assert problems(state.folder) == []
    assert newest(tmp_path, "k") == state
    assert caplog.records == []


def test_a_manifest_that_is_a_link_is_not_followed(tmp_path):
    state = save(tmp_path / "state", 5).folder
    (state / "manifest.json").rename(tmp_path / "elsewhere")
    (state / "manifest.json").symlink_to(tmp_path / "elsewhere")
    assert problems(state) == [f"manifest.json: cannot be read: {os.strerror(errno.ELOOP)}"]


def use_up_files() -> list[int]:
    """Open files until this process may open no more."""
    handles = []
    while True:
        try:
            handles.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return handles


def test_what_cannot_be_read_for_now_is_not_set_aside(tmp_path):
    save(tmp_path, 1)
    with limited(resource.RLIMIT_NOFILE, 16 + max(map(int, os.listdir("/proc/self/fd")))):
        handles = use_up_files()
        os.close(handles.pop())  # now the root can be listed, and the manifest not opened beside
        try:
            with os.scandir(tmp_path), pytest.raises(ResourceError, match="cannot be read: Too many open files"):
                problems(tmp_path / "step-00000001")
        finally:
            for handle in handles:
                os.close(handle)
    assert names(tmp_path) == ["step-00000001"]
    assert newest(tmp_path).step == 1


def test_a_sealed_model_is_checked(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    fill(model)
    sealed = seal(model)
    assert sealed == {"sub/abc": {"size": 3, "sha256": ABC}, "empty": {"size": 0, "sha256": NOTHING}}
    assert broken(model, json.loads(json.dumps(sealed))) == []
    (model / "pytorch_model.bin").write_bytes(b"")
    (model / "sub" / "abc").write_bytes(b"abd")
    assert broken(model, sealed) == ["sub/abc: changed"]
    assert broken(tmp_path / "absent", sealed) == [".: not a folder"]
    (tmp_path / "link").symlink_to(model)
    assert broken(tmp_path / "link", sealed) == [".: not a folder"]
