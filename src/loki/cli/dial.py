"""`loki dial`: less of a trained change, for less forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.cli.options import DeviceOption, DtypeOption, JsonOption, SeedOption, TrustOption
from loki.results import Result


def dial(
    adapter: Annotated[Path, typer.Argument(help="Folder of a trained LoKI or LoRA adapter.")],
    budget: Annotated[
        str,
        typer.Option(
            help="Forgetting that is allowed: a rise of the text's perplexity such as 1%, or a divergence from the "
            "base in nats per token such as 0.02."
        ),
    ] = "1%",
    model: Annotated[str | None, typer.Option(help="Base of the adapter; the one that it names when left out.")] = None,
    completions: Annotated[
        str,
        typer.Option(
            help="Held-out examples of the task: JSON Lines as for `loki train`, or `function-calls`, the built-in "
            "task's test."
        ),
    ] = "function-calls",
    examples: Annotated[int, typer.Option(help="At most so many of them.")] = 60,
    text: Annotated[
        str,
        typer.Option(
            help="Text that must not be forgotten: wikitext2, c4 (with --data-dir), or JSON Lines with "
            "`text`; `probe`, the built-in questions."
        ),
    ] = "probe",
    text_tokens: Annotated[int, typer.Option(help="Tokens of the text, drawn by --seed.")] = 4096,
    window: Annotated[int, typer.Option(help="Tokens of the text that are read together.")] = 256,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the texts that have a name.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="scale (all alike), layers (a scale for each), rows (LoKI: some are taken back); may be repeated, "
            "and the least task loss wins. Default: scale; the others keep more of the loss, not more answers "
            "(docs/dial.md)."
        ),
    ] = None,
    points: Annotated[int, typer.Option(help="Points of each curve, besides those near the budget.")] = 5,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the dialled adapter; <adapter>-dialled when left out.")
    ] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn an adapter down until it forgets no more than a budget allows, without training again.

    Prints and draws what the task keeps against what the text loses, and writes the best adapter within the budget. An
    interrupted run goes on when the same command is given again.

    Example: loki dial adapter --model embedded --budget 1%
    """
    import shutil

    from loki.cli.show import notes, print_json, track
    from loki.dialling.adapter import CONFIG, CURVE, RESULT, WEIGHTS, DialledAdapter, require_dialable
    from loki.dialling.budget import parse_budget
    from loki.dialling.measure import Yardstick
    from loki.dialling.run import PROGRESS, Progress
    from loki.dialling.run import dial as run_dial
    from loki.dialling.settings import parse_ways
    from loki.errors import InputError
    from loki.evaluation.text import FILES, Text, load_texts
    from loki.models import load_model, load_tokenizer
    from loki.prompts.function_calls import make_examples
    from loki.provenance import digest, digest_file, fingerprint_model, require_new_directory
    from loki.reporting.dial import dial_picture
    from loki.results import finite
    from loki.training.examples import BUILT_IN, load_examples
    from loki.training.texts import read_texts

    allowed = parse_budget(budget)
    for option, value in (("--examples", examples), ("--text-tokens", text_tokens), ("--points", points)):
        if value < 1:
            raise InputError(f"{option} {value} is not possible: give 1 or more")
    config = require_dialable(adapter)
    ways = parse_ways(by, has_rows=config["peft_type"] == "LOKI")
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise InputError(f"adapter {adapter} does not name its base: give --model")
    output = output_dir or adapter.resolve().with_name(f"{adapter.resolve().name}-dialled")
    require_new_directory(output)
    if completions == BUILT_IN:
        held_out = [example.as_prompt_completion() for example in make_examples("test", examples, seed)]
    else:
        held_out = load_examples(completions, count=examples, seed=seed)
    if text in FILES:
        texts = load_texts(text, data_dir)
    else:
        texts = [Text(str(number), part) for number, part in enumerate(read_texts(text, what="--text"))]
    base = load_model(str(name), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(str(name), trust_remote_code=trust_remote_code)
    fingerprint = fingerprint_model(base).as_dict()
    dialled = DialledAdapter.load(base, adapter)
    yardstick = Yardstick.of(
        dialled, tokenizer, held_out, text, texts, window=window, max_tokens=text_tokens, seed=seed
    )
    settings = {
        "adapter": {part: digest_file(adapter / part) for part in (CONFIG, WEIGHTS)},
        "base": fingerprint,
        "budget": budget,
        "completions": completions,
        "held_out": digest(held_out),
        "text": text,
        "texts": digest([ids_T.tolist() for ids_T in yardstick.windows]),
        "by": list(ways),
        "points": points,
    }
    unfinished = output.with_name(f"{output.name}.unfinished")
    progress = Progress(unfinished / PROGRESS, settings)
    found = run_dial(dialled, yardstick, allowed, ways, num_points=points, progress=progress, track=track)
    result = Result("dial", settings, finite(found.figures()), seed=seed, model=str(name))

    def write_also(folder: Path) -> None:
        result.save(folder / RESULT)
        try:
            dial_picture(result).save(folder / CURVE)
        except InputError as error:
            notes.print(f"no picture: {error}", markup=False)

    dialled.save(output, write_also)
    shutil.rmtree(unfinished, ignore_errors=True)
    if as_json:
        print_json(result)
    else:
        _print(result, str(allowed))
    chosen, figures = found.chosen, result.figures["chosen"]
    notes.print(
        f"wrote {output}: by {chosen.by} at {chosen.position:.2f}, {figures['gain_kept_percent']:.0f} % of what was "
        f"learned, perplexity {figures['perplexity_rise_percent']:+.2f} %, divergence {figures['kl']:.4f}",
        markup=False,
    )


def _print(result: Result, budget: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    figures = result.figures
    base, chosen = figures["base"], figures["chosen"]
    table = Table(title=f"Budget: {budget}", title_justify="left", header_style="bold", box=SIMPLE, pad_edge=False)
    for column in ("by", "position", "task loss", "learned, %", "perplexity, %", "KL, nats"):
        table.add_column(column, justify="left" if column == "by" else "right", no_wrap=True)
    table.add_row("base", "", f"{base['task_loss']:.4f}", "0", "", "")
    for point in figures["points"]:
        is_chosen = (point["by"], point["position"]) == (chosen["by"], chosen["position"])
        table.add_row(
            point["by"],
            f"{point['position']:.3f}",
            f"{point['task_loss']:.4f}",
            f"{point['gain_kept_percent']:.0f}",
            f"{point['perplexity_rise_percent']:+.2f}",
            f"{point['kl']:.4f}",
            style="bold" if is_chosen else None,
        )
    Console(highlight=False).print(table)
