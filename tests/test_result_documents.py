"""README.md and docs/ say what results/*.json say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = "<!-- table: results/forgetting.json {} -->\n{}<!-- end of table -->\n"


def check(folder):
    command = [sys.executable, str(folder / "scripts/write_results.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tables_are_those_of_the_results():
    done = check(ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def elsewhere(tmp_path):
    """The script and the results in another folder, with documents that have nothing to fill in."""
    (tmp_path / "results").symlink_to(ROOT / "results")
    for folder in ("scripts", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scripts/write_results.py").write_text((ROOT / "scripts/write_results.py").read_text())
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        (tmp_path / path.relative_to(ROOT)).write_text("nothing to fill in\n")
    return tmp_path


def test_a_table_that_was_touched_is_found(elsewhere):
    text = (ROOT / "docs/results.md").read_text()
    assert "| method |" in text
    (elsewhere / "docs/results.md").write_text(text.replace("| method |", "| methods |", 1))
    done = check(elsewhere)
    assert done.returncode == 1
    assert "docs/results.md is not what results/*.json say: run python scripts/write_results.py" in done.stderr


def test_rows_of_some_methods(elsewhere):
    """All of a table's methods, and then two of them and the base."""
    whole = BLOCK.format("learned", "")
    some = BLOCK.format("learned lora full", "")
    (elsewhere / "README.md").write_text(f"{whole}\n{some}")
    assert check(elsewhere).returncode == 1
    subprocess.run([sys.executable, str(elsewhere / "scripts/write_results.py")], check=True)
    all_rows, rows = (
        [line.split("|")[1].strip() for line in block.splitlines() if line.startswith("| ")]
        for block in (elsewhere / "README.md").read_text().split("<!-- end of table -->")[:2]
    )
    assert rows == ["method", "---", "base, untrained", "full fine-tuning", "LoRA r=16"]
    assert set(rows) < set(all_rows)
