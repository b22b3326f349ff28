from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loki.analysis import plan
from loki.analysis.attribution import attribute
from loki.analysis.run import AnalysisOptions, analyse
from loki.analysis.settings import KVASettings
from loki.errors import ArtefactError, InputError, OutputError
from loki.log import AttributionLog, schema
from loki.prompts.prompt import Prompt
from loki.prompts.render import encode_chat
from loki.provenance import fingerprint_model

WORDS = ["<unk>", "<s>", "user", "model", ":", *(f"w{i}" for i in range(30))]
SETTINGS = KVASettings(steps=3)


def message(prompt_id: str, content: str) -> Prompt:
    return Prompt(prompt_id, messages=({"role": "user", "content": content},))


PROMPTS = [
    message("a", "w1 w2 w3"),
    message("b", "w4"),
    message("c", "w5 w6 w7 w8"),
    message("d", "w9 w1"),
    message("e", "w10 w11 w12"),
]


@pytest.fixture(autouse=True)
def _parts_of_two_prompts(monkeypatch):
    monkeypatch.setattr(plan, "PROMPTS_PER_PART", 2)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(max_position_embeddings=9)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word; the chat template adds five: `<s> user : … model :`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "<s> {% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}model :{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        chat_template=template,
    )


@pytest.fixture
def run(model, tokenizer, tmp_path):
    defaults = {"model_name": "tiny", "prompt_set": "words"}
    return partial(analyse, model, tokenizer, PROMPTS, SETTINGS, tmp_path / "log.h5", **defaults)


def names(directory):
    return {entry.name for entry in directory.iterdir()}


def scores_of(path):
    with AttributionLog(path) as log:
        return np.concatenate(list(log.chunks()))


def interrupt_after(number):
    def track(items, what, *, sizes, unit):
        assert (what, unit) == ("analysing", "prompts")
        assert len(sizes) == len(items)
        for done, item in enumerate(items):
            if done == number:
                raise KeyboardInterrupt
            yield item

    return track


def test_the_log_holds_what_attribute_returns(run, model, tokenizer, tmp_path):
    run()
    with AttributionLog(tmp_path / "log.h5") as log:
        scores_NLD = np.concatenate(list(log.chunks()))
        for n, prompt in enumerate(PROMPTS):
            ids_T = encode_chat(tokenizer, prompt.messages)
            words = ["<s>", "user", ":", *prompt.messages[0]["content"].split(), "model", ":"]
            assert ids_T.tolist() == [WORDS.index(word) for word in words]
            expected = attribute(model, ids_T[None], steps=3)
            np.testing.assert_array_equal(scores_NLD[n], expected.scores[0].numpy())
            np.testing.assert_array_equal(log.column(schema.COMPLETENESS_GAPS)[n], expected.completeness_gap[0].numpy())
            assert log.column(schema.TARGET_IDS)[n] == expected.target_ids[0]
            assert log.column(schema.NUM_TOKENS)[n] == len(words)
        assert [text.decode() for text in log.column(schema.PROMPT_IDS)] == list("abcde")
        assert log.header.model == fingerprint_model(model).as_dict()
        assert log.header.model_name == "tiny"
        assert log.header.prompts.startswith("words ")
        assert log.header.settings == {**SETTINGS.as_dict(), "target": "predicted"}
        assert log.header.versions["torch"] == torch.__version__
    assert names(tmp_path) == {"log.h5"}


def test_unknown_gaps_are_nan(model, tokenizer, tmp_path):
    analyse(
        model,
        tokenizer,
        PROMPTS[:1],
        KVASettings("riemann_middle", 2),
        tmp_path / "log.h5",
        model_name="tiny",
        prompt_set="words",
    )
    with AttributionLog(tmp_path / "log.h5") as log:
        assert np.isnan(log.column(schema.COMPLETENESS_GAPS)).all()


@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(run, tmp_path, num_done):
    run()
    whole = scores_of(tmp_path / "log.h5")
    (tmp_path / "log.h5").unlink()

    with pytest.raises(KeyboardInterrupt):
        run(track=interrupt_after(num_done))
    assert names(tmp_path) == {"log.h5.parts"}
    seen = []
    run(track=lambda items, _what, **_: seen.extend(items) or items)
    assert seen == list(range(num_done, 3))
    np.testing.assert_array_equal(scores_of(tmp_path / "log.h5"), whole)


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 100}, {"max_branches": 1}])
def test_batches_and_groups_change_scores_by_rounding_only(run, tmp_path, options):
    run()
    whole = scores_of(tmp_path / "log.h5")
    (tmp_path / "log.h5").unlink()
    run(options=AnalysisOptions(**options))
    other = scores_of(tmp_path / "log.h5")
    assert (np.linalg.norm(other - whole, axis=-1) / np.linalg.norm(whole, axis=-1)).max() < 1e-5


def test_an_unfinished_run_of_other_arguments_is_refused(run, model, tokenizer, tmp_path, tiny_model):
    with pytest.raises(KeyboardInterrupt):
        run(track=interrupt_after(1))
    other_message = [message("a", "w20"), *PROMPTS[1:]]
    other_model = tiny_model(seed=1, max_position_embeddings=9)
    for arguments, changed in [
        ((model, tokenizer, PROMPTS, KVASettings(steps=2)), "settings"),
        ((model, tokenizer, other_message, SETTINGS), "prompts"),
        ((other_model, tokenizer, PROMPTS, SETTINGS), "model"),
    ]:
        with pytest.raises(ArtefactError, match=f"unfinished log of other .*{changed}"):
            analyse(*arguments, tmp_path / "log.h5", model_name="tiny", prompt_set="words")
    with pytest.raises(ArtefactError, match="unfinished log of other batch_size"):
        run(options=AnalysisOptions(batch_size=3))


def test_a_prompt_longer_than_the_model_takes_is_refused_before_any_work(model, tokenizer, tmp_path):
    """Five tokens of the template and 4 words are 9, the model's limit; one word more is too much."""
    fits, too_long = message("fits", "w1 w2 w3 w4"), message("long one", "w1 w2 w3 w4 w5")
    options = {"model_name": "tiny", "prompt_set": "words"}
    with pytest.raises(InputError, match="prompt 'long one' has 10 tokens, the model takes 9: shorten it"):
        analyse(model, tokenizer, [fits, too_long], SETTINGS, tmp_path / "log.h5", **options)
    assert names(tmp_path) == set()
    analyse(model, tokenizer, [fits], SETTINGS, tmp_path / "log.h5", **options)
    assert scores_of(tmp_path / "log.h5").shape == (1, 3, 16)


def test_an_existing_output_is_refused_and_untouched(run, tmp_path):
    (tmp_path / "log.h5").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"log\.h5"):
        run()
    assert (tmp_path / "log.h5").read_bytes() == b"mine"
    assert names(tmp_path) == {"log.h5"}


def test_no_prompts_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="no prompts to analyse: give at least one"):
        analyse(model, tokenizer, [], SETTINGS, tmp_path / "log.h5", model_name="tiny", prompt_set="none")
    assert names(tmp_path) == set()


def test_scores_that_overflow_stop_the_run_with_the_prompts_name(tokenizer, tmp_path, tiny_model):
    model = tiny_model(max_position_embeddings=9)
    model.lm_head.weight.data[:] = float("inf")
    with pytest.raises(InputError, match="attribution of prompt 'c' is not finite at layer 0, row 0"):
        analyse(model, tokenizer, PROMPTS, SETTINGS, tmp_path / "log.h5", model_name="tiny", prompt_set="words")
