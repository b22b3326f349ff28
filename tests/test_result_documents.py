"""README.md and docs/ say what results/*.json say, and those what the runs beside them say."""

import subprocess
import sys
from pathlib import Path

import pytest

from loki.results import Result
from loki.study.collect import collect
from loki.study.conduct import Study
from loki.study.settings import load_study

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


@pytest.mark.parametrize("name", ["rivals", "rivals_long", "rows", "reranking_long"])
def test_figures_are_those_of_the_runs(name, tmp_path):
    """Whoever takes up a study from its runs in the repository gets its figures."""
    settings = load_study(ROOT / f"experiments/{name}.yaml", data_dir=tmp_path)
    found = collect(settings, Study(settings, ROOT / "results" / name).results)
    published = Result.load(ROOT / f"results/{name}.json")
    here, there = flat(found.figures), flat(published.figures)
    numbers = {path for path, leaf in there.items() if isinstance(leaf, float)}
    assert len(numbers) > 100
    assert {path: here.pop(path) for path in numbers} == pytest.approx({path: there.pop(path) for path in numbers})
    assert here == there
    assert found.settings == published.settings


def test_studies_that_are_read_together_are_alike(tmp_path):
    """Documents say that they have the same examples, steps and questions."""
    first, *others = (
        load_study(ROOT / f"experiments/{name}.yaml", data_dir=tmp_path) for name in ("forgetting", "rivals", "rows")
    )
    for settings in others:
        for part in ("model", "dtype", "task", "train", "evaluate"):
            assert getattr(settings, part) == getattr(first, part)
        assert settings.analyses["mmlu"] == first.analyses["mmlu"]


def flat(value, at=""):
    """All that JSON holds, by where it stands."""
    if not isinstance(value, dict | list | tuple):
        return {at: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, part in parts for path, leaf in flat(part, f"{at}/{key}").items()}
