"""LlamaFactory's training, with LoKI adapters known to PEFT: arguments are those of `llamafactory-cli train`."""

from llamafactory.train.tuner import run_exp

import loki  # noqa: F401  # importing it registers the method, and LlamaFactory has no other place for that

if __name__ == "__main__":
    run_exp()
