"""Two models side by side, and what counts as changed."""

import pytest
import torch
from tiny import make_model, make_tokenizer

from loki.evaluation.compare import compare_models, count_changed
from loki.evaluation.completions import completion_losses
from loki.prompts.function_calls import make_examples
from loki.prompts.questions import load_probe

EXAMPLES = [
    {"prompt": [{"role": "user", "content": f"say {word}"}], "completion": [{"role": "assistant", "content": word}]}
    for word in ("one", "seventeen")
]


def test_changed_weights_are_counted_one_by_one():
    before, after = make_model(), make_model()
    with torch.no_grad():
        after.model.layers[1].mlp.down_proj.weight[4, :7] += 1
        after.model.norm.weight[2] += 1
    assert count_changed(before, after) == (8, sum(p.numel() for p in before.parameters()))


def test_a_model_against_itself_has_changed_in_nothing():
    evaluation = compare_models(
        make_model(),
        make_model(),
        make_tokenizer(),
        requests=make_examples("test", 6, 0),
        completions=EXAMPLES,
        questions=load_probe("evaluation")[:12],
    )
    rows = {row.name: row for row in evaluation.comparisons}
    assert list(rows) == [
        "Task, functions seen",
        "Task, functions unseen",
        "Task, no function fits",
        "Task, loss of completions",
        "Knowledge, accuracy",
        "Knowledge, log-probability",
        "KL divergence to the base",
        "Forgetting score",
        "Weights changed",
    ]
    assert all(row.change.value == 0 for row in rows.values() if row.change is not None)
    assert rows["KL divergence to the base"].after.value == 0
    assert rows["Weights changed"].after.value == 0


def test_what_is_not_asked_for_is_not_measured():
    evaluation = compare_models(make_model(), make_model(1), make_tokenizer())
    assert [row.name for row in evaluation.comparisons] == ["Weights changed"]


@pytest.mark.parametrize("max_length", [None, 2048])
def test_loss_of_completions_is_the_mean_over_their_tokens(max_length):
    """Computed token by token, without a batch or a cache; the end token counts."""
    model, tokenizer, expected = make_model(), make_tokenizer(), []
    for example in EXAMPLES:
        prompt = tokenizer(f"<|user|>{example['prompt'][0]['content']}<|end|><|assistant|>").input_ids
        completion = tokenizer(f"{example['completion'][0]['content']}<|end|>").input_ids
        losses = []
        for index, token in enumerate(completion):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *completion[:index]]])).logits[0, -1]
            losses.append(-float(logits.log_softmax(-1)[token]))
        expected.append(sum(losses) / len(losses))
    found = completion_losses(model, tokenizer, EXAMPLES, max_length=max_length)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_long_prompt_is_cut_at_its_start():
    """With 5 tokens left, the completion `one` and its end are scored after one token of the prompt."""
    model, tokenizer = make_model(), make_tokenizer()
    (found,) = completion_losses(model, tokenizer, EXAMPLES[:1], max_length=5)
    ids = torch.tensor([tokenizer("<|assistant|>one<|end|>").input_ids])
    with torch.no_grad():
        log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
    assert found == pytest.approx(-float(log_probabilities.gather(1, ids[0, 1:, None]).mean()), rel=1e-5)
