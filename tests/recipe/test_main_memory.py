"""Main memory under a container's or a control group's limit, from files like the kernel's."""

import psutil
import pytest

from rlhf.recipe.main_memory import main_memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that writes the files of control groups on a machine of 16 GiB with 10 free."""
    memory = psutil.virtual_memory()._replace(total=16 * GIB, available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    def write(place="/", **files):
        membership = tmp_path / "cgroup"
        if not membership.exists():
            membership.write_text(f"0::{place}\n")
        folder = tmp_path / "groups" / place.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / f"memory.{name}").write_text(f"{content}\n")
        return main_memory(tmp_path / "groups", membership)

    return write


def test_without_a_limit_the_machine_s_memory_counts(machine):
    found = machine(max="max")
    assert (found.total, found.limit, found.free, found.usable) == (16 * GIB, None, 10 * GIB, 16 * GIB)


def test_a_limit_bounds_what_is_free_and_file_caches_count_as_free(machine):
    found = machine(max=6 * GIB, current=5 * GIB, stat=f"anon 1\ninactive_file {2 * GIB}\nactive_file {GIB}")
    assert (found.limit, found.free, found.usable) == (6 * GIB, 4 * GIB, 6 * GIB)


def test_the_narrowest_group_on_the_way_up_counts(machine):
    machine("/user/job", max=8 * GIB, current=GIB)
    found = machine("/user", max=4 * GIB, current=3 * GIB)
    assert (found.limit, found.free) == (4 * GIB, 1 * GIB)


def test_version_1_s_memory_controller_is_read(machine, tmp_path):
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/other\n4:memory:/job\n")
    found = machine("/memory/job", limit_in_bytes=3 * GIB, usage_in_bytes=GIB)
    assert (found.limit, found.free) == (3 * GIB, 2 * GIB)


def test_where_nothing_is_shown_there_is_no_limit(tmp_path):
    found = main_memory(tmp_path / "none", tmp_path / "nothing")
    assert found.limit is None
    assert 0 < found.free <= found.total
