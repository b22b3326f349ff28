import pytest
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer
from transformers import Trainer, TrainingArguments

from loki.errors import InputError
from loki.training.budget import ForgettingBudget
from loki.training.modes import require_own_base
from loki.training.preserve import PreservePredictions


def lora(beginning):
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=beginning, task_type="CAUSAL_LM")
    return get_peft_model(make_model(), config)


@pytest.mark.parametrize("beginning", [True, False, "gaussian", "orthogonal"])
def test_most_adapters_leave_the_base_as_it_was(beginning):
    require_own_base(lora(beginning), "it")
    require_own_base(make_model(), "it")


@pytest.mark.parametrize("beginning", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize(
    ("callback", "name"),
    [(ForgettingBudget, "the forgetting budget"), (PreservePredictions, "preserve")],
)
def test_a_lora_that_took_its_beginning_out_of_the_base_is_refused(tmp_path, beginning, callback, name):
    watching = callback(["some text to read"], tokenizer=make_tokenizer())
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(InputError, match=f"{name} needs the base as the model .* begins with '{beginning}' changes"):
        Trainer(model=lora(beginning), args=args, callbacks=[watching])
