"""`loki evaluate`: before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.cli.options import DeviceOption, DtypeOption, JsonOption, ModelArgument, SeedOption, TrustOption


def evaluate(
    model: ModelArgument,
    base: Annotated[str | None, typer.Option(help="The model before training, to compare with.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter: compare MODEL with and without it.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Benchmarks for lm-eval, such as arc_easy,piqa, likelihood or loki-paper, and what is learned: bfcl, "
            "acebench, toolace, scifact (docs/evaluate.md)."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Running text for loss and divergence: wikitext2, c4 or a JSON Lines file with `text`."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the benchmarks' data; without it lm-eval's own tasks from the Hub.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items of each task, drawn by --seed, the same for every model.")
    ] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Tokens of each text, drawn by --seed.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts that --tasks reads at once.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a reply; each task's own number when left out.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Solved problems in front of each question; each task's own number when left out."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put each question as a message, not as plain text.")
    ] = False,
    baseline: Annotated[
        Path | None, typer.Option(help="What --output wrote of the model before training, instead of --base.")
    ] = None,
    fail_above: Annotated[
        str | None, typer.Option(help="Exit with 1 where losses-only forgetting is above this, such as 1%.")
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let humaneval run what the model writes.")
    ] = False,
    requests: Annotated[int, typer.Option(help="Function-calling test requests; 0 leaves the task out.")] = 100,
    completions: Annotated[
        str | None, typer.Option(help="JSON Lines of held-out examples: report the loss of their completions.")
    ] = None,
    knowledge: Annotated[
        bool, typer.Option("--knowledge/--no-knowledge", help="Ask the evaluation half of the built-in probe.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a model learned and what it forgot, against the model it was trained from.

    Without --tasks and --text: function calls and the built-in probe, which need nothing else.

    Example: loki evaluate merged --base embedded

    Example: loki evaluate merged --base embedded --tasks arc_easy,piqa --data-dir data --limit 200 --fail-above 1%
    """
    from functools import partial

    from loki.cli.show import notes, print_comparisons, print_json, track
    from loki.errors import InputError
    from loki.evaluation.compare import compare_models
    from loki.models import load_model, load_tokenizer, merge_in_memory
    from loki.prompts.function_calls import make_examples
    from loki.prompts.questions import load_probe
    from loki.provenance import require_writable_parent
    from loki.results import Result
    from loki.training.examples import load_examples

    load = partial(load_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if tasks or text:
        from loki.cli.benchmarks import BenchmarkOptions, evaluate_benchmarks
        from loki.evaluation.text import FILES

        if completions is not None:
            raise InputError(
                f"--completions {completions} is not read beside --tasks or --text: evaluate it on its own"
            )
        chosen, texts = split_names(tasks), split_names(text)
        if data_dir is not None:  # a text of the data folder is as good as a task; on the Hub `c4` is the harness' own
            texts += tuple(name for name in chosen if name in FILES and name not in texts)
            chosen = tuple(name for name in chosen if name not in FILES)
        options = BenchmarkOptions(
            model=model,
            base=base,
            adapter=adapter,
            tasks=chosen,
            texts=texts,
            data_dir=data_dir,
            limit=limit,
            text_tokens=text_tokens,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            num_fewshot=num_fewshot,
            chat_template=chat_template,
            baseline=baseline,
            fail_above=fail_above,
            allow_code_execution=allow_code_execution,
            output=output,
            seed=seed,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            as_json=as_json,
        )
        evaluate_benchmarks(options, load)
        return
    of_benchmarks = {
        "--data-dir": data_dir,
        "--limit": limit,
        "--text-tokens": text_tokens,
        "--max-new-tokens": max_new_tokens,
        "--num-fewshot": num_fewshot,
        "--chat-template": chat_template or None,
        "--baseline": baseline,
        "--fail-above": fail_above,
        "--allow-code-execution": allow_code_execution or None,
    }
    for option, value in of_benchmarks.items():
        if value is not None:
            raise InputError(f"{option} goes with benchmarks: give --tasks or --text too")
    if (base is None) == (adapter is None):
        raise InputError("name what to compare with: either --base MODEL (before training) or --adapter DIR")
    if requests < 0:
        raise InputError(f"--requests {requests} is not possible: give 0 or more")
    if output is not None:
        require_writable_parent(output)
    held_out = load_examples(completions, count=None, seed=seed) if completions else []
    before = load(base or model)
    after = load(model) if adapter is None else merge_in_memory(load(model), adapter)
    evaluation = compare_models(
        before,
        after,
        load_tokenizer(base or model, trust_remote_code=trust_remote_code),
        requests=make_examples("test", requests, seed) if requests else (),
        completions=held_out,
        questions=load_probe("evaluation") if knowledge else (),
        track=track,
    )
    settings = {
        "model": model,
        "base": base,
        "adapter": str(adapter) if adapter else None,
        "requests": requests,
        "completions": completions,
        "knowledge": "probe" if knowledge else None,
        "dtype": dtype,
    }
    result = Result("evaluate", settings, evaluation.figures, evaluation.comparisons, seed, model)
    if output is not None:
        result.save(output)
        notes.print(f"wrote {output}")
    if as_json:
        print_json(result)
    else:
        print_comparisons(result.comparisons, f"{base or model} before and after")


def split_names(values: list[str] | None) -> tuple[str, ...]:
    """Names of an option that may be given several times, each time with several names between commas."""
    return tuple(name for value in values or () for part in value.split(",") if (name := part.strip()))
