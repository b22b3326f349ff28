"""Train the selected rows with TRL's SFTTrainer.

python docs/recipes/trl_sft.py --model MODEL --positions 10.json --data examples.jsonl --output-dir adapter
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from loki import ForgettingBudget, LokiConfig


def main() -> None:
    """Train, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--positions", required=True, help="positions file that `loki select-nodes` wrote")
    parser.add_argument("--data", required=True, help="JSON Lines with `prompt` and `completion`, lists of messages")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-kl", type=float, default=0.1, help="stop above this KL to the base, in nats per token")
    args = parser.parse_args()

    budget = ForgettingBudget("probe", max_kl=args.max_kl, every=20, probe_accuracy=False)
    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=f"{args.output_dir}.checkpoints",
            model_init_kwargs={"dtype": "float32"},
            # TRL turns on both by default: the change of the rows is float32, and small models have the memory.
            bf16=False,
            gradient_checkpointing=False,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=args.batch_size,
            logging_steps=5,
            seed=0,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        peft_config=LokiConfig(positions=args.positions, task_type="CAUSAL_LM"),
        callbacks=[budget],
    )
    trainer.train()
    trainer.model.save_pretrained(args.output_dir)
    for row in budget.history:
        print(f"step {row['step']}: per-token loss {row['loss_rise']:+.4f}, KL {row['kl']:.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
