"""`loki analyse`: stage 1."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loki.choices import (
    EngineName,
    LogDtypeName,
    ModuleName,
    Objective,
    Rule,
    ScoreName,
    SiteName,
    SplitName,
    TargetName,
)
from loki.cli.options import DeviceOption, DtypeOption, ForceOption, JsonOption, ModelArgument, SeedOption, TrustOption
from loki.errors import InputError, OutputError

PROMPTS, METHOD, WORK = "Prompts", "Method", "Work"
KVA_OPTIONS = ("target", "rule", "steps", "objective", "multiply", "site", "engine", "max_branches")
"""Parameters of the command that say nothing to other scores."""


def analyse(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option(help="Log to write. Default: the score's name, kva.h5.", show_default=False),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="probe (built in), mmlu, or a .jsonl[.gz] file whose rows have question and choices, prompt, text or "
            "messages. Give it several times to mix; name=0.7 gives a source's share of the prompts. Default: probe.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with MMLU as JSON Lines or CSV; the Hub when left out.", rich_help_panel=PROMPTS),
    ] = None,
    split: Annotated[
        SplitName | None, typer.Option(help="Split of MMLU. Default: test.", rich_help_panel=PROMPTS)
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(
            help="Subjects of MMLU: all, 56 (those of the public implementation), or names with commas.  Default: all.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    samples_per_subject: Annotated[
        int | None, typer.Option(help="At most so many prompts of each subject.", rich_help_panel=PROMPTS)
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="So many prompts in all, drawn at random.", rich_help_panel=PROMPTS)
    ] = None,
    seed: SeedOption = 0,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Put messages into the model's chat template; where it has one, when left out.",
            rich_help_panel=PROMPTS,
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        TargetName,
        typer.Option(help="Attribute the model's own next token, or the answer's.", rich_help_panel=PROMPTS),
    ] = "predicted",
    score: Annotated[
        ScoreName,
        typer.Option(
            help="kva attributes the next token of each prompt; the others take every position of a text: the damage "
            "of a change of the row, its Fisher information, its first-order importance, or the norm of its output.",
            rich_help_panel=METHOD,
        ),
    ] = "kva",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Cut longer texts into windows of at most so many tokens; not for kva. Default: 512.",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        Rule,
        typer.Option(help="Quadrature rule on the path from zero to the activation.", rich_help_panel=METHOD),
    ] = "riemann_left",
    steps: Annotated[int, typer.Option(help="Nodes of the rule.", rich_help_panel=METHOD)] = 7,
    objective: Annotated[
        Objective, typer.Option(help="What is differentiated.", rich_help_panel=METHOD)
    ] = "probability",
    multiply: Annotated[
        bool,
        typer.Option(
            "--multiply/--no-multiply",
            help="Multiply gradients by activations (integrated gradients).",
            rich_help_panel=METHOD,
        ),
    ] = True,
    site: Annotated[
        SiteName, typer.Option(help="Which output is scaled; `auto` knows the family.", rich_help_panel=METHOD)
    ] = "auto",
    site_module: Annotated[
        ModuleName, typer.Option(help="Whose rows: the feed-forward block's or attention's.", rich_help_panel=METHOD)
    ] = "down_proj",
    engine: Annotated[
        EngineName, typer.Option(help="`recompute` is the plain definition, and slow.", rich_help_panel=METHOD)
    ] = "branch",
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Prompts that go through the model together; when left out 4 on a CPU and 8 elsewhere, 1 and 4 for "
            "scores other than kva.",
            rich_help_panel=WORK,
            show_default=False,
        ),
    ] = None,
    max_branches: Annotated[
        int | None,
        typer.Option(
            help="Branches under way at once, which bounds memory; as many as fit into 768 MiB when left out.",
            rich_help_panel=WORK,
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    log_dtype: Annotated[LogDtypeName, typer.Option(help="Stored scores.", rich_help_panel=WORK)] = "float32",
    device: DeviceOption = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread the model over devices, as `transformers` does: auto, balanced, sequential, or a JSON file "
            "that maps modules to devices.",
            rich_help_panel=WORK,
        ),
    ] = None,
    offload_dir: Annotated[
        Path | None, typer.Option(help="Folder for weights that `--device-map` puts on disk.", rich_help_panel=WORK)
    ] = None,
    use_flash_attention: Annotated[
        bool, typer.Option("--use-flash-attention", help="Flash attention for the prompt.", rich_help_panel=WORK)
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: only this part of the prompts; see `loki merge-logs`.", rich_help_panel=WORK),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time a few prompts, tell what all would cost, and write nothing.")
    ] = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
) -> None:
    """Attribute knowledge to the rows of every down-projection (KVA), or score what changing them would damage.

    An interrupted analysis goes on when the same command is given again. Several processes share the work under
    `accelerate launch -m loki analyse …` or `torchrun -m loki analyse …`.

    Example: loki analyse embedded --dataset mmlu --data-dir data --samples-per-subject 5 --output kva.h5
    """
    from loki.analysis.estimate import estimate
    from loki.analysis.ranks import Ranks
    from loki.analysis.run import Analysis, AnalysisOptions
    from loki.analysis.settings import KVASettings, RowScoreSettings
    from loki.cli.kept_memory import keep_compiled_kernels, keep_freed_memory
    from loki.cli.show import notes, print_json, track
    from loki.models import launched_dtype, load_model, load_tokenizer, model_label
    from loki.progress import silent
    from loki.prompts.mmlu import PUBLIC_SUBJECTS
    from loki.prompts.sources import describe_datasets, load_datasets, parse_dataset
    from loki.provenance import require_writable_parent
    from loki.results import Result

    settings: KVASettings | RowScoreSettings
    if score == "kva":
        if max_tokens is not None:
            raise InputError(f"--max-tokens {max_tokens} is for scores other than kva: leave it out")
        settings = KVASettings(rule, steps, objective, multiply, site, engine, site_module)
    else:
        _refuse_kva_options(context, score)
        if log_dtype != "float32":
            raise InputError(f"--log-dtype {log_dtype} is for --score kva: leave it out, {score} may be below 6e-8")
        settings = RowScoreSettings(score, seed, 512 if max_tokens is None else max_tokens, site_module)
    output = output or Path(f"{score}.h5")
    specs = [parse_dataset(text) for text in dataset or ["probe"]]
    for option, value in (("--data-dir", data_dir), ("--split", split), ("--subjects", subjects)):
        if value is not None and all(spec.name_or_path != "mmlu" for spec in specs):
            raise InputError(f"{option} {value} is for MMLU: give --dataset mmlu, or leave it out")
    split = split or "test"
    chosen_subjects = None
    if subjects not in (None, "all"):
        chosen_subjects = PUBLIC_SUBJECTS if subjects == "56" else tuple(map(str.strip, subjects.split(",")))
    prompts = load_datasets(
        specs,
        data_dir=data_dir,
        split=split,
        subjects=chosen_subjects,
        samples_per_subject=samples_per_subject,
        num_prompts=num_prompts,
        seed=seed,
    )
    if not dry_run:
        if output.is_dir():
            raise OutputError(f"output {output} is a folder: name a file in it, such as {output / 'kva.h5'}")
        require_writable_parent(output)
        if force:
            _require_log(output)
    ranks = Ranks.from_launcher()
    if dry_run and ranks.num_ranks > 1:
        raise InputError("--dry-run times one process: leave the launcher out")
    loaded = load_model(
        model,
        dtype=launched_dtype(dtype),
        device=device or (ranks.device if device_map is None else None),
        device_map=device_map,
        offload_dir=offload_dir,
        attention="flash_attention_2" if use_flash_attention else None,
        trust_remote_code=trust_remote_code,
    )
    if batch_size is None:
        on_cpu, elsewhere = (4, 8) if score == "kva" else (1, 4)
        batch_size = on_cpu if loaded.device.type == "cpu" else elsewhere
    keep_freed_memory()
    keep_compiled_kernels()
    analysis = Analysis.of(
        loaded,
        load_tokenizer(model, trust_remote_code=trust_remote_code),
        prompts,
        settings,
        AnalysisOptions(target, chat_template, batch_size, max_branches, shard, log_dtype),
        model_name=model_label(model),
        prompt_set=describe_datasets(
            specs,
            split=split,
            subjects=chosen_subjects,
            samples_per_subject=samples_per_subject,
            num_prompts=num_prompts,
            seed=seed,
        ),
    )
    if dry_run:
        found = estimate(analysis)
        if as_json:
            print_json(
                Result("estimate", dict(analysis.header.settings), asdict(found), seed=seed, model=model_label(model))
            )
        else:
            notes.print(str(found), soft_wrap=True)
        return
    if force:
        if ranks.is_first:
            _remove(output)
        ranks.wait_for_all()
    is_new = analysis.write(output, ranks=ranks, track=track if ranks.is_first else silent)
    if ranks.is_first:
        if as_json:
            header = analysis.header
            figures = {
                "log": str(output),
                "num_prompts": analysis.num_prompts,
                "num_layers": header.num_layers,
                "num_rows": header.num_rows,
            }
            print_json(Result("analyse", dict(header.settings), figures, seed=seed, model=model_label(model)))
        what = f"wrote {output}" if is_new else f"{output} is complete already"
        notes.print(f"{what}: {analysis.num_prompts:,} prompts")
    ranks.leave()


def _refuse_kva_options(context: typer.Context, score: str) -> None:
    """What the command line gives of KVA's own options means nothing to another score."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in KVA_OPTIONS and source is not None and source.name == "COMMANDLINE":
            names = "/".join([*parameter.opts, *parameter.secondary_opts])
            raise InputError(f"{names} is for --score kva: leave it out, or leave out --score {score}")


def _require_log(path: Path) -> None:
    """`--force` replaces a log; whatever else is there may be somebody's only copy."""
    import h5py

    if path.exists() and not h5py.is_hdf5(path):
        raise OutputError(f"{path} is no attribution log, so --force leaves it alone: choose another output file")


def _remove(path: Path) -> None:
    import shutil

    try:
        path.unlink(missing_ok=True)
        parts = path.with_name(path.name + ".parts")
        if parts.exists():
            shutil.rmtree(parts)
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}; choose another output file") from error
