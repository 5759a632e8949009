"""`rlhf compare` on folders that cannot be compared."""

from click.testing import CliRunner

from rlhf.cli import main


def test_a_run_given_twice_is_refused(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to(run)
    for other in (run, tmp_path / "link", run / ".." / "run"):
        result = CliRunner().invoke(main, ["compare", str(run), str(other)])
        assert result.exit_code == 2
        assert "given twice" in result.stderr
