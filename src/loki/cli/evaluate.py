"""`loki evaluate`: before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.cli.options import DeviceOption, DtypeOption, JsonOption, ModelArgument, SeedOption, TrustOption


def evaluate(
    model: ModelArgument,
    base: Annotated[str | None, typer.Option(help="The model before training, to compare with.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoKI adapter: compare MODEL with and without it.")] = None,
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

    Example: loki evaluate merged --base embedded
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

    if (base is None) == (adapter is None):
        raise InputError("name what to compare with: either --base MODEL (before training) or --adapter DIR")
    if requests < 0:
        raise InputError(f"--requests {requests} is not possible: give 0 or more")
    if output is not None:
        require_writable_parent(output)
    held_out = load_examples(completions, count=None, seed=seed) if completions else []
    load = partial(load_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
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
