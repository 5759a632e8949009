"""Which run folders `rlhf compare` takes, and how it knows where their recipes came from."""

import json
import os

import pytest
from click.testing import CliRunner

from rlhf.cli import main
from rlhf.report.runs import recipe_folder


@pytest.mark.parametrize("again", ["{run}", "{run}/", "{run}/../run", "{link}"])
def test_one_folder_twice_is_refused(tmp_path, again):
    run, link = tmp_path / "run", tmp_path / "link"
    run.mkdir()
    link.symlink_to(run)
    second = again.format(run=run, link=link)
    result = CliRunner().invoke(main, ["compare", str(run), second, "-o", str(tmp_path / "report.html")])
    assert result.exit_code == 2
    assert "given twice" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["link", "run"]


def test_the_folder_of_the_recipe_is_known_where_it_was_recorded(tmp_path):
    assert recipe_folder(tmp_path) is None
    for text in ("{", "[]", "{}", json.dumps({"recipe": None})):
        (tmp_path / "environment.json").write_text(text)
        assert recipe_folder(tmp_path) is None
    (tmp_path / "environment.json").write_text(json.dumps({"recipe": "/a/b.yaml"}))
    assert str(recipe_folder(tmp_path)) == "/a"
