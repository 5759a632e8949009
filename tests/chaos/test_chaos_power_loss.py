"""A few power failures of those that `python -m tests.chaos` makes, and what the model of the disk promises."""

import os
import random

from tests.chaos import power_loss
from tests.chaos._power import Disk, write_tree


def test_a_run_goes_on_after_a_power_failure():
    done = power_loss.run(5, random.Random(3))
    assert done.passed, str(done)
    assert done.counts["lost power"] == 5


def test_what_was_flushed_is_found_and_what_was_not_may_be_anything(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    (root / "before").write_bytes(b"sure")
    seen: dict[str, set] = {"before": set(), "appended": set(), "new": set(), "moved": set(), "renamed": set()}
    with Disk(root, random.Random(1), lambda path: None) as disk:
        for name in ("appended", "moved"):
            with (root / name).open("wb") as file:
                file.write(b"sure")
                file.flush()
                os.fsync(file.fileno())
        handle = os.open(root, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        with (root / "appended").open("ab") as file:
            file.write(b"maybe")
        (root / "new").write_bytes(b"new")
        (root / "moved").rename(root / "renamed")
        for _ in range(200):
            found = disk.found()
            for name, contents in seen.items():
                contents.add(found.get(name))
            assert ("moved" in found) != ("renamed" in found)
    assert seen["before"] == {b"sure"}
    assert {content[:4] for content in seen["appended"]} == {b"sure"}
    assert {b"sure", b"suremaybe", b"sure" + bytes(5)} <= seen["appended"]
    assert {None, b"", b"new", bytes(3)} <= seen["new"]
    assert {None, b"sure"} == seen["moved"] == seen["renamed"]
    write_tree({"folder": {"file": b"x"}, "link": "folder/file"}, tmp_path / "written")
    assert (tmp_path / "written" / "link").read_bytes() == b"x"
