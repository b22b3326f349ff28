"""Adapters of every kind that can be dialled, on a tiny model, with examples and a text."""

import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer

from loki import LokiConfig
from loki.evaluation.completions import completion_loss
from loki.evaluation.text import Text

POSITIONS = [[1, 7], [0, 3, 19], [5]]
EXAMPLES = [
    {
        "prompt": [{"role": "user", "content": f"say {word}"}],
        "completion": [{"role": "assistant", "content": word}],
    }
    for word in ("red", "green", "blue")
]
TEXTS = [Text("a", "water runs down the hill"), Text("b", "birds fly south")]
CONFIGS = {
    "rows": lambda: LokiConfig(positions=POSITIONS, task_type="CAUSAL_LM"),
    "product": lambda: LokiConfig(positions=POSITIONS, r=2, task_type="CAUSAL_LM"),
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "rslora": lambda: LoraConfig(r=2, target_modules=["o_proj"], use_rslora=True, task_type="CAUSAL_LM"),
}


def train(config, *, steps):
    """A tiny model with an adapter that has learned the examples."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), config)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        loss = sum(completion_loss(model, make_tokenizer(), example) for example in EXAMPLES)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model
