"""`make test-lowest` runs the very versions that pyproject.toml gives as the lowest."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Why these are not pinned to their lower bound stands in tests/lowest.txt.
NOT_LOWEST = {"torch", "lm-eval"}


def lower_bounds() -> dict[str, str]:
    """Package → lower bound, of all that users are asked to install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [text for name, texts in extras.items() if name != "dev" for text in texts]
    found = {}
    for text in wanted:
        if not text.startswith("loki-peft["):
            name, bound = re.fullmatch(r"([a-z0-9-]+)(?:\[[a-z,]+\])?>=([0-9.]+)", text).groups()
            found[name] = bound
    return found


def pins() -> dict[str, str]:
    """Package → version, of tests/lowest.txt."""
    lines = (ROOT / "tests/lowest.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def release(version: str) -> tuple[int, ...]:
    """2.0 and 2.0.0 are the same version."""
    numbers = [int(number) for number in version.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


def test_every_lower_bound_is_the_version_that_is_tested():
    bounds = lower_bounds()
    assert len(bounds) > len(NOT_LOWEST)
    pinned = {name: version for name, version in pins().items() if name in bounds and name not in NOT_LOWEST}
    expected = {name: release(bound) for name, bound in bounds.items() if name not in NOT_LOWEST}
    assert {name: release(version) for name, version in pinned.items()} == expected


def test_no_lower_bound_is_above_what_make_install_takes():
    newest = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for name, bound in lower_bounds().items():
        assert release(bound) <= release(newest[name]), name
