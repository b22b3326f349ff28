"""`loki analyse`: stage 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import EngineName, Objective, Rule, SiteName
from loki.cli.options import DeviceOption, DtypeOption, ForceOption, ModelArgument, TrustOption


def analyse(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="Attribution log to write.")] = Path("kva.h5"),
    dataset: Annotated[str, typer.Option(help="Prompts to attribute: probe (built in).")] = "probe",
    rule: Annotated[
        Rule, typer.Option(help="Quadrature rule on the path from zero to the activation.")
    ] = "riemann_left",
    steps: Annotated[int, typer.Option(help="Nodes of the rule.")] = 7,
    objective: Annotated[Objective, typer.Option(help="What is differentiated.")] = "probability",
    multiply: Annotated[
        bool, typer.Option("--multiply/--no-multiply", help="Multiply gradients by activations (integrated gradients).")
    ] = True,
    site: Annotated[SiteName, typer.Option(help="Which output is scaled; `auto` knows the family.")] = "auto",
    engine: Annotated[EngineName, typer.Option(help="`recompute` is the plain definition, and slow.")] = "branch",
    batch_size: Annotated[int, typer.Option(help="Prompts between two saves.")] = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
) -> None:
    """Attribute knowledge to the rows of every down-projection (KVA).

    An interrupted analysis goes on when the same command is given again.

    Example: loki analyse embedded --output kva.h5
    """
    import shutil

    from loki.analysis.run import analyse as run_analysis
    from loki.analysis.run import probe_prompts
    from loki.analysis.settings import KVASettings
    from loki.cli.show import notes, track
    from loki.errors import InputError
    from loki.models import load_model, load_tokenizer, model_label
    from loki.provenance import require_writable_parent

    if dataset != "probe":
        raise InputError(f"dataset {dataset!r} is unknown: choose probe")
    settings = KVASettings(rule, steps, objective, multiply, site, engine)
    require_writable_parent(output)
    if force:
        output.unlink(missing_ok=True)
        shutil.rmtree(output.with_name(output.name + ".parts"), ignore_errors=True)
    run_analysis(
        load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code),
        load_tokenizer(model, trust_remote_code=trust_remote_code),
        probe_prompts(),
        settings,
        output,
        model_name=model_label(model),
        prompt_set=dataset,
        batch_size=batch_size,
        track=track,
    )
    notes.print(f"wrote {output}")
