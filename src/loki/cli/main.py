"""`loki`: reads the command line and starts one command; errors become one line and exit code 2."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from typing import Annotated

import typer

from loki import __version__
from loki.cli.analyse import analyse
from loki.cli.compare_positions import compare_positions
from loki.cli.create_model import create_model
from loki.cli.demo import demo
from loki.cli.dial import dial
from loki.cli.evaluate import evaluate
from loki.cli.export_lora import export_lora
from loki.cli.info import info
from loki.cli.merge import merge
from loki.cli.merge_logs import merge_logs
from loki.cli.report import report
from loki.cli.restore_model import restore_model
from loki.cli.run import run as run_command
from loki.cli.select_nodes import select_nodes
from loki.cli.study import study
from loki.cli.suppress import suppress
from loki.cli.train import train
from loki.cli.uninstall import uninstall
from loki.errors import LokiError

BAD_INPUT = 2
INTERRUPTED = 130
INTERRUPTED_MESSAGE = "interrupted; the same command goes on where it stopped"

app = typer.Typer(
    help="Fine-tune a language model without it forgetting: analyse, select, implant, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command("run")(run_command)
app.command()(analyse)
app.command()(merge_logs)
app.command()(select_nodes)
app.command()(compare_positions)
app.command()(train)
app.command()(merge)
app.command()(dial)
app.command()(uninstall)
app.command()(create_model)
app.command()(restore_model)
app.command()(export_lora)
app.command()(suppress)
app.command()(evaluate)
app.command()(study)
app.command()(report)
app.command()(info)


def _show_version(value: bool) -> None:
    if value:
        print(f"loki-peft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")] = False,
) -> None:
    """Options of every command."""


# Typer itself shows bad options over several lines; here every error is one.
command = typer.main.get_command(app)


def run() -> None:
    """Entry point of the `loki` command."""
    arguments = [_with_hyphens(argument) for argument in sys.argv[1:]]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _set_up_messages(debug=debug)
    try:
        code = command.main(args=arguments, prog_name="loki", standalone_mode=False)
    except LokiError as error:
        if debug:
            raise
        _stop(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        _stop(INTERRUPTED_MESSAGE, INTERRUPTED)
    except Exception as error:
        # Click's own exceptions; Typer carries a copy of Click, so they are known by what they offer.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "loki"
        _stop(f"{error.format_message()} (see `{where} --help`)", BAD_INPUT)
    if code == INTERRUPTED:  # how Typer tells of a KeyboardInterrupt
        _stop(INTERRUPTED_MESSAGE, INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _with_hyphens(argument: str) -> str:
    """`--output_dir=x_y` as `--output-dir=x_y`: options may be written with underscores."""
    return re.sub(r"^--[\w-]+", lambda option: option[0].replace("_", "-"), argument)


def _set_up_messages(*, debug: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(kind)s: %(message)s"))
    handler.addFilter(_name_kind)
    logger = logging.getLogger("loki")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        warnings.simplefilter("ignore")
        for variable, value in {
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
        }.items():
            os.environ.setdefault(variable, value)


def _name_kind(record: logging.LogRecord) -> bool:
    """What users call a message of this level; every record is shown."""
    record.kind = "note" if record.levelno == logging.INFO else record.levelname.lower()
    return True


def _stop(message: str, code: int) -> None:
    # In one write, which another process cannot break in two; `print` writes the line's end by itself.
    sys.stderr.write(f"loki: {' '.join(message.split())}\n")
    sys.exit(code)
