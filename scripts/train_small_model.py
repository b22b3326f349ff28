"""Trains a small language model of another shape than the demo's, for questions that one model cannot settle.

    python scripts/train_small_model.py --data-dir data --output runs/small_neox [--steps 600]

GPT-NeoX (the shape of Pythia): attention and FFN side by side, an FFN of two matrices with biases and GELU, no gate.
Eight layers of 256 by 1,024 and a byte-level vocabulary of 4,096 that is trained on the same texts, 8.4 million weights
in all. It reads the analysis half of WikiText-2 and C4, SciFact's abstracts, and instructions, 2.4 million tokens once;
the other half of the two corpora stays unseen. Some fifteen minutes on one processor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from loki.evaluation.text import load_texts
from loki.prompts.json_lines import read_rows, text_field

END = "<|endoftext|>"
VOCABULARY, WINDOW, BATCH = 4096, 256, 16
LEARNING_RATE, WARMUP = 2e-3, 50


def texts(data_dir: Path) -> Iterator[str]:
    """Everything that is read in training."""
    for name in ("wikitext2", "c4"):
        yield from (text.text for text in load_texts(name, data_dir, part="analysis"))
    for _, number, row in read_rows(data_dir / "rerank/scifact_corpus.jsonl.gz"):
        yield text_field(row, "text", f"passage {number}")
    for _, number, row in read_rows(data_dir / "instruct/alpaca_en_demo.jsonl"):
        where = f"instruction {number}"
        yield f"{text_field(row, 'instruction', where)}\n{text_field(row, 'output', where)}"


def train_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def train(model: GPTNeoXForCausalLM, tokens_T: torch.Tensor, steps: int) -> None:
    """AdamW with a linear decay, windows drawn at random."""
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, (steps - step) / max(1, steps - WARMUP))
    )
    start, recent = time.monotonic(), []
    for step in range(1, steps + 1):
        places = torch.randint(len(tokens_T) - WINDOW, (BATCH,), generator=draw)
        ids_BT = torch.stack([tokens_T[place : place + WINDOW] for place in places])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        recent.append(float(loss.detach()))
        if step % 100 == 0 or step == steps:
            print(f"step {step}, loss {sum(recent) / len(recent):.3f}, {time.monotonic() - start:.0f} s", flush=True)
            recent.clear()


def main() -> None:
    """Train, and save with the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    chosen = parser.parse_args()
    corpus = list(texts(chosen.data_dir))
    tokenizer = train_tokenizer(corpus)
    tokens_T = torch.tensor([id_ for text in corpus for id_ in [*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPTNeoXForCausalLM(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(corpus):,} texts, {len(tokens_T):,} tokens, {weights:,} weights")
    train(model.train(), tokens_T, chosen.steps)
    model.eval().save_pretrained(chosen.output)
    tokenizer.save_pretrained(chosen.output)


if __name__ == "__main__":
    main()
