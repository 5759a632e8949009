"""What `make test` runs: every file, in an order that names none that is gone."""

from __future__ import annotations

from pathlib import Path

from tests.side_by_side import LONGEST, ROOT, every_file, groups, uses_ray


def test_the_files_that_take_longest_exist_and_begin() -> None:
    assert every_file()[: len(LONGEST)] == [f"tests/{name}.py" for name in LONGEST]
    assert sorted(every_file()) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


def test_every_test_of_ray_is_in_a_lane_and_every_other_beside_them() -> None:
    lanes, beside = groups()
    assert beside.files == every_file()
    assert set(lanes.files) == {file for file in beside.files if uses_ray(file)}
    assert "tests/actors/test_cluster.py" in lanes.files
    assert "tests/algorithms/test_kl.py" not in lanes.files
    assert {"-m", lanes.marks} < set(lanes.command())
    assert lanes.command()[-1] == lanes.files[-1]
    assert Path(lanes.files[0]).name == "test_cluster.py"
