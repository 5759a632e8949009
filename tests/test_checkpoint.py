"""States on disk: whole or not there, the newest whole one found, the right ones kept."""

import math
import resource
import threading

import pytest

from rlhf import manifest
from rlhf.checkpoint import newest, problems, prune, states, write
from rlhf.errors import ResourceError, TrainingError
from rlhf.manifest import read_manifest, seal, seal_file
from tests.small_states import ABC, fill, limited, names, save


def test_numbers_that_are_not_finite_come_back(tmp_path):
    saved = write(tmp_path, 1, "k", fill, {"loss": math.nan, "kl": math.inf})
    found = newest(tmp_path)
    assert math.isnan(saved.info["loss"])
    assert math.isnan(found.info["loss"])
    assert found.info["kl"] == math.inf


def test_nothing_there_is_none(tmp_path):
    assert newest(tmp_path / "absent") is None
    (tmp_path / "file").write_text("")
    assert newest(tmp_path / "file") is None
    for junk in (
        "step-1",
        "step-0000000x",
        "step-00000001.bak",
        ".partial-step-00000009-00",
        "quarantine-step-00000009",
    ):
        (tmp_path / "root" / junk).mkdir(parents=True)
    (tmp_path / "root" / "step-00000003").write_text("a file")
    (tmp_path / "root" / "step-00000004").symlink_to(tmp_path)
    assert newest(tmp_path / "root") is None
    assert len(names(tmp_path / "root")) == 7


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (100_000_000, 99_999_999, 2, 10):
        save(tmp_path, step)
    assert [folder.name for folder in states(tmp_path)][1:] == ["step-00000010", "step-99999999", "step-100000000"]
    assert newest(tmp_path).step == 100_000_000


def test_states_of_another_key_are_passed_over(tmp_path):
    mine, other = save(tmp_path, 3, key="mine"), save(tmp_path, 7, key="other")
    (other.folder / "empty").write_bytes(b"damaged, but nobody's business")
    assert newest(tmp_path, "mine") == mine
    assert newest(tmp_path, "third") is None
    assert names(tmp_path) == ["step-00000003", "step-00000007"]


def test_a_step_that_is_damaged_twice_is_set_aside_twice(tmp_path):
    for _ in range(2):
        (save(tmp_path, 1).folder / "empty").unlink()
        assert newest(tmp_path) is None
    assert len([name for name in names(tmp_path) if name.startswith("quarantine-step-00000001")]) == 2


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 1, loss=1.0)
    save(tmp_path, 2, loss=2.0)
    again = save(tmp_path, 2, key="other", loss=3.0)
    assert newest(tmp_path) == again
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_replacement_that_was_cut_short_keeps_the_old_state(tmp_path):
    save(tmp_path, 1)
    old = save(tmp_path, 2, loss=2.0).folder
    aside = old.rename(tmp_path / "step-00000002-replaced-0123abcd")
    assert newest(tmp_path).folder == aside
    assert newest(tmp_path).info == {"metrics": {"loss": 2.0}}
    (tmp_path / ".partial-step-00000002-89abcdef").mkdir()
    new = save(tmp_path, 2)
    assert states(tmp_path) == [tmp_path / "step-00000001", new.folder]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    old = save(tmp_path, 1)

    def fail(folder):
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, "k", fail, {})
    with pytest.raises(ConnectionResetError):
        write(tmp_path, 2, "k", lambda _: (_ for _ in ()).throw(ConnectionResetError(104, "reset")), {})
    with pytest.raises(TypeError):
        write(tmp_path, 2, "k", fill, {"not": object()})
    with pytest.raises(TrainingError, match="link: a symbolic link"):
        write(tmp_path, 2, "k", lambda folder: (folder / "link").symlink_to("/etc/hostname"), {})
    with pytest.raises(ValueError, match=r"manifest\.json"):
        write(tmp_path, 2, "k", lambda folder: (folder / "manifest.json").touch(), {})
    assert names(tmp_path) == ["step-00000001"]
    assert newest(tmp_path) == old


def plain(path):
    path.write_bytes(bytes(200_000))


def with_safetensors(path):
    import numpy
    from safetensors.numpy import save_file

    save_file({"x": numpy.zeros(50_000, numpy.float32)}, path)


def with_torch(path):
    import torch

    torch.save({"x": torch.zeros(50_000)}, path)


@pytest.mark.parametrize(
    ("writer", "said"), [(plain, "File too large"), (with_safetensors, "File too large"), (with_torch, "No space")]
)
def test_a_disk_that_refuses_is_told_whatever_writes(tmp_path, writer, said):
    old = save(tmp_path, 1)
    writer(tmp_path / "warm")  # imports may write caches
    with limited(resource.RLIMIT_FSIZE, 100_000), pytest.raises(ResourceError, match=f"step 2 cannot be saved: {said}"):
        write(tmp_path, 2, "k", lambda folder: writer(folder / "big"), {})
    assert names(tmp_path) == ["step-00000001", "warm"]
    assert newest(tmp_path) == old


def test_a_full_disk_is_told_with_what_helps(tmp_path):
    def overflow(folder):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(ResourceError) as caught:
        write(tmp_path, 2, "k", overflow, {})
    assert "No space left on device; free some space" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == []


def test_space_is_checked_before(tmp_path):
    (tmp_path / ".partial-step-00000001-00").mkdir()
    with pytest.raises(
        ResourceError, match=rf"{tmp_path}: the state of step 2 needs 1073741824.00 GiB and [\d.]+ GiB are free; "
    ):
        write(tmp_path, 2, "k", lambda _: pytest.fail("too early"), {}, bytes_needed=2**60)
    assert names(tmp_path) == []


def test_retention_keeps_the_last_and_the_best(tmp_path):
    for step, reward in enumerate((0.5, 0.9, 0.9, math.nan, 0.1, 0.2), start=1):
        save(tmp_path, step, reward=reward)
    write(tmp_path, 7, "k", fill, {})
    prune(tmp_path, 2, ("reward", "max"))
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]
    prune(tmp_path, 1, ("reward", "min"))
    assert names(tmp_path) == ["step-00000006", "step-00000007"]
    prune(tmp_path, 1, ("absent", "min"))
    assert names(tmp_path) == ["step-00000007"]
    prune(tmp_path, 0, None)
    assert names(tmp_path) == ["step-00000007"]
    prune(tmp_path / "absent", 1, None)


def test_retention_never_takes_the_newest_whole_state(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000004" / "empty").unlink()
    (tmp_path / "step-00000003" / "manifest.json").write_text("")
    prune(tmp_path, 1, None)
    assert newest(tmp_path).step == 2
    assert "step-00000001" not in names(tmp_path)


def test_retention_counts_every_key_for_itself_and_drops_what_was_replaced(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, key="new")
    for step in (50, 60):
        save(tmp_path, step, key="old")
    save(tmp_path, 2, key="new").folder.rename(tmp_path / "step-00000002-replaced-00000000")
    save(tmp_path, 9, key="new").folder.rename(tmp_path / "aside")
    write(tmp_path, 3, "new", fill, {})
    save(tmp_path, 3, key="new").folder.rename(tmp_path / "step-00000003-replaced-00000000")
    (tmp_path / "aside").rename(tmp_path / "step-00000009")
    prune(tmp_path, 2, None)
    assert [folder.name for folder in states(tmp_path)] == [
        "step-00000003-replaced-00000000",
        "step-00000009",
        "step-00000050",
        "step-00000060",
    ]


def test_states_that_come_and_go_do_not_disturb_the_reader(tmp_path, caplog):
    save(tmp_path, 1)
    failures = []

    def come_and_go():
        try:
            for step in range(2, 60):
                save(tmp_path, step)
                prune(tmp_path, 1, None)
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=come_and_go)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(newest(tmp_path, "k").step)
    writer.join()
    assert failures == []
    assert seen == sorted(seen)
    assert names(tmp_path) == ["step-00000059"]
    assert caplog.records == []


def sealed_by_its_writer(folder):
    """Fill a folder as a rank does that seals its own file; another file is left to be sealed by the reader."""
    (folder / "rank").write_bytes(b"abc")
    (folder / "other").write_bytes(b"")
    return {"rank": seal_file(folder / "rank")}


def test_what_its_writer_sealed_is_not_read_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(manifest, "seal_file", lambda path: (read.append(path.name), seal_file(path))[1])
    saved = write(tmp_path, 1, "k", sealed_by_its_writer, {})
    assert read == ["other"]
    files = read_manifest(saved.folder)["files"]
    (saved.folder / "manifest.json").unlink()
    assert files == seal(saved.folder)
    assert files["rank"] == {"size": 3, "sha256": ABC}


def test_a_bit_that_flips_before_the_manifest_is_written_is_found(tmp_path):
    def fill_and_flip(folder):
        seals = sealed_by_its_writer(folder)
        (folder / "rank").write_bytes(b"abb")
        return seals

    older = save(tmp_path, 1)
    flipped = write(tmp_path, 2, "k", fill_and_flip, {})
    assert problems(flipped.folder) == ["rank: changed"]
    assert newest(tmp_path, "k") == older


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (lambda folder: (folder / "rank").unlink(), "rank: its writer left 3 bytes, and it is not there"),
        (lambda folder: (folder / "rank").write_bytes(b"ab"), "rank: its writer left 3 bytes, and it has 2 here"),
        (lambda folder: ((folder / "rank").unlink(), (folder / "rank").symlink_to("other")), "rank: a symbolic link"),
    ],
)
def test_a_sealed_file_that_does_not_arrive_is_told_and_nothing_is_saved(tmp_path, then, said):
    def lost(folder):
        seals = sealed_by_its_writer(folder)
        then(folder)
        return seals

    older = save(tmp_path, 1)
    with pytest.raises(TrainingError, match=said):
        write(tmp_path, 2, "k", lost, {})
    assert names(tmp_path) == ["step-00000001"]
    assert newest(tmp_path) == older
