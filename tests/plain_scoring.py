"""What a benchmark's score should be, computed plainly: one unpadded text at a time, in float64."""

import torch


def continuation(model, tokenizer, context: str, text: str) -> tuple[float, bool]:
    """Log-probability of `text` after `context`, and whether every token of it is the likeliest."""
    start = len(tokenizer(context).input_ids)
    ids = tokenizer(context + text).input_ids
    assert ids[:start] == tokenizer(context).input_ids
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0].double()
    log_probabilities_TV = logits_TV.log_softmax(-1)
    positions = range(start, len(ids))
    total = sum(float(log_probabilities_TV[position - 1, ids[position]]) for position in positions)
    return total, all(int(logits_TV[position - 1].argmax()) == ids[position] for position in positions)


def likeliest(model, tokenizer, pairs: list[tuple[str, str]], *, divisors: list[int] | None = None) -> int:
    """Index of the (context, text) of highest log-probability, each divided by its divisor."""
    divisors = divisors or [1] * len(pairs)
    scores = [continuation(model, tokenizer, *pair)[0] / by for pair, by in zip(pairs, divisors, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)
