"""How far a trained LoKI adapter should have moved predictions, by the damage of its rows, were its changes random.

    loki study experiments/forgetting.yaml --data-dir data --keep-adapters --only random-q10-same-rate --only damage-q10
    python benchmarks/expected_damage.py runs/forgetting/analyses/damage.h5 runs/forgetting/adapters/*

For each adapter: the size of its change, and the sum over rows of ½ d_j ‖Δ_j‖² / F nats a token (`docs/damage.md`), to
be held against the divergence that the study measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from loki.implanting.stored_rows import layer_number
from loki.log.reader import AttributionLog
from loki.provenance import read_json
from loki.rows import RowSelection


def expected(damage_LD: np.ndarray, adapter: Path) -> tuple[float, float]:
    """Nats a token, and the norm of the whole change."""
    config = read_json(adapter / "adapter_config.json", what="adapter")
    rows = RowSelection.from_lists(config["positions"]).rows
    nats = squares = 0.0
    for name, change_KF in load_file(adapter / "adapter_model.safetensors").items():
        if name.endswith("loki_delta"):
            layer = layer_number(name)
            assert layer is not None, f"{name} is in no layer"
            squares_K = change_KF.double().square().sum(1).numpy()
            nats += float(0.5 * damage_LD[layer][list(rows[layer])] @ squares_K) / change_KF.shape[1]
            squares += float(squares_K.sum())
    return nats, squares**0.5


def main() -> None:
    """One line for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    chosen = parser.parse_args()
    with AttributionLog(chosen.log) as log:
        damage_LD = log.mean_scores()
    for adapter in chosen.adapters:
        nats, norm = expected(damage_LD, adapter)
        print(f"{adapter.name}: {nats:.4f} nats expected, change of norm {norm:.1f}")


if __name__ == "__main__":
    main()
