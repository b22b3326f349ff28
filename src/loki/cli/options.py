"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loki.choices import DtypeName

ModelArgument = Annotated[str, typer.Argument(help="Hugging Face model folder, Hub id, or `embedded`.")]
ModelOption = Annotated[str, typer.Option("--model", help="Hugging Face model folder, Hub id, or `embedded`.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="`auto` is float32 on a CPU and bfloat16 elsewhere.")]
DeviceOption = Annotated[str | None, typer.Option(help="Such as cpu, cuda or cuda:1; the best there is when left out.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's folder.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Start from nothing and replace what is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse files made with other weights or dtype.")]
OutputDirOption = Annotated[Path | None, typer.Option(help="Run directory, instead of the one in the settings.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
