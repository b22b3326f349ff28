"""Train the selected rows with FSDP2: base and change are spread over the processes.

torchrun --nproc_per_node 2 docs/recipes/fsdp2.py --model MODEL --positions 10.json --data examples.jsonl \
    --output-dir adapter
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer

from loki import LokiConfig
from loki.architecture import decoder_layers
from loki.training.encoding import IGNORED, encode_examples
from loki.training.examples import load_examples


def padded(rows: list[np.ndarray], value: int, device: torch.device) -> torch.Tensor:
    """Rows of different lengths as one tensor (N, T), int64."""
    tensors = [torch.from_numpy(row).long() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(device)


def main() -> None:
    """Train, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--positions", required=True, help="positions file that `loki select-nodes` wrote")
    parser.add_argument("--data", required=True, help="JSON Lines as `loki train` takes them")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4, help="examples per process and step")
    args = parser.parse_args()

    place = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if place.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("gloo" if place.type == "cpu" else None)
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh(place.type, (num_ranks,))

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    layers = decoder_layers(model)
    model = get_peft_model(model, LokiConfig(positions=args.positions, task_type="CAUSAL_LM"))
    # First the change is put in, then everything is spread: each layer by itself, the rest with the whole model.
    for layer in layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)

    examples = encode_examples(tokenizer, load_examples(args.data, count=None, seed=0), max_length=2048)
    num_examples = len(examples.input_ids)
    model.train()
    for step in range(args.steps):
        start = (step * num_ranks + rank) * args.batch_size
        chosen = [index % num_examples for index in range(start, start + args.batch_size)]
        # What stands in a padded place is never looked at: it follows the text, and its label is ignored.
        input_ids = padded([examples.input_ids[index] for index in chosen], 0, place)
        labels = padded([examples.labels[index] for index in chosen], IGNORED, place)[:, 1:]
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        num_tokens = (labels != IGNORED).sum()
        distributed.all_reduce(num_tokens)
        # FSDP averages gradients over the processes; the loss is a mean over the tokens of all of them.
        (total * num_ranks / num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = total.detach() / num_tokens
        distributed.all_reduce(loss)
        if rank == 0:
            print(f"step {step + 1}: loss {loss:.4f}", flush=True)  # noqa: T201

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=whole)
    if rank == 0:
        model.save_pretrained(args.output_dir, state_dict=state)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
