"""What tests of conversion share: small LoKI models, their tensors, and how they are trained."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loki import create_loki_model

INPUT_IDS = torch.arange(1, 13).reshape(2, 6)
POSITIONS = [[7, 1, 15], [], [0, 14, 3, 2]]
"""As published ones: unsorted. A layer without rows is left as it is."""


def write_positions(path: Path, positions: object = None) -> Path:
    path.write_text(json.dumps(POSITIONS if positions is None else positions))
    return path


def create(base: Path, positions: Path, output: Path, **options) -> Path:
    create_loki_model(
        model_name=str(base), target_pos_path=positions, save_dir=output, **{"torch_dtype": "auto", **options}
    )
    return output


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


def train(folder: Path, output: Path, **options) -> Path:
    """A few steps on whatever requires gradients."""
    model = load(folder, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    return output


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found.update(load_file(file))
    return found


def names_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
