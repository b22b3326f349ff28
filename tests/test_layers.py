"""Imports run in one direction: a module imports only from those above it in the list."""

import ast
import subprocess
import sys
from pathlib import Path

import loki

ORDER = [
    "choices",
    "constants",
    "errors",
    "architecture",
    "heads",
    "provenance",
    "results",
    "rows",
    "embedded",
    "models",
    "progress",
    "prompts",
    "log",
    "analysis",
    "selection",
    "model_costs",
    "implanting",
    "evaluation",
    "training",
    "dialling",
    "reporting",
    "run_settings",
    "study",
    "stages",
    "pipeline",
    "cli",
]
ENTRANCES = {"__init__", "__main__", "_peft_hook"}
PACKAGE = Path(loki.__file__).parent


def area(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_areas(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "loki" else [f"loki.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("loki.")}
    return found


def test_every_part_is_in_the_order():
    assert {area(path) for path in PACKAGE.rglob("*.py")} == {*ORDER, *ENTRANCES}


def test_no_module_imports_from_below_it():
    for path in PACKAGE.rglob("*.py"):
        if area(path) in ENTRANCES:
            continue
        rank = ORDER.index(area(path))
        for imported in imported_areas(path) & set(ORDER):
            assert ORDER.index(imported) <= rank, f"{path.relative_to(PACKAGE)} imports loki.{imported}"


def test_no_relative_imports():
    for path in PACKAGE.rglob("*.py"):
        levels = [node.level for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any(levels), path


def test_results_are_read_and_drawn_without_torch():
    """Importing it takes ten times as long as a page of tables."""
    code = "import sys, loki.study.collect, loki.study.page; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
