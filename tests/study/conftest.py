import pytest
import yaml

METHODS = {
    "full": {"kind": "full", "label": "full", "learning_rates": [1e-4, 1e-3, 1e-2], "seeds": [0, 1]},
    "rows": {
        "kind": "loki",
        "label": "random rows",
        "rows": {"strategy": "random", "quota": 10},
        "learning_rates": [1e-3],
        "seeds": [3],
    },
    "zeroed": {"kind": "suppress", "label": "random rows at zero", "rows": {"strategy": "random", "quota": 10}},
}


@pytest.fixture
def write_study(tmp_path):
    """Writes a study's YAML, some of its settings changed, and returns where it is."""

    def write(**changes):
        values = {
            "title": "Tiny",
            "model": "a-model",
            "data_dir": str(tmp_path),
            "train": {"steps": 8, "screen_steps": 2},
            "methods": METHODS,
            **changes,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write
