"""README.md and docs/ say what results/*.json say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check(folder):
    command = [sys.executable, str(folder / "scripts/write_results.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tables_are_those_of_the_results():
    done = check(ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_that_was_touched_is_found(tmp_path):
    (tmp_path / "results").symlink_to(ROOT / "results")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/write_results.py").write_text((ROOT / "scripts/write_results.py").read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing to fill in\n")
    text = (ROOT / "docs/results.md").read_text()
    assert "| method |" in text
    (tmp_path / "docs/results.md").write_text(text.replace("| method |", "| methods |", 1))
    done = check(tmp_path)
    assert done.returncode == 1
    assert "docs/results.md is not what results/*.json say: run python scripts/write_results.py" in done.stderr
