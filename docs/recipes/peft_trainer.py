"""Train the selected rows with plain PEFT and the Trainer of transformers.

python docs/recipes/peft_trainer.py --model MODEL --positions 10.json --data examples.jsonl --output-dir adapter
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from loki import ForgettingBudget, LokiConfig


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> dict[str, list[int]]:
    """Tokens of prompt and completion in the chat template, labels on the completion only."""
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


def main() -> None:
    """Train, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--positions", required=True, help="positions file that `loki select-nodes` wrote")
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with `prompt` and `completion`")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-kl", type=float, default=0.1, help="stop above this KL to the base, in nats per token")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    model = get_peft_model(model, LokiConfig(positions=args.positions, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    with args.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    budget = ForgettingBudget("probe", max_kl=args.max_kl, every=20, probe_accuracy=False)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{args.output_dir}.checkpoints",
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=args.batch_size,
            logging_steps=5,
            seed=0,
            report_to="none",
        ),
        train_dataset=[encode(tokenizer, row) for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[budget],
    )
    trainer.train()
    model.save_pretrained(args.output_dir)
    for row in budget.history:
        print(f"step {row['step']}: per-token loss {row['loss_rise']:+.4f}, KL {row['kl']:.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
