"""`loki demo`: the main job on the embedded model."""

from __future__ import annotations

from typing import Annotated

import typer

from loki.cli.options import ForceOption, JsonOption, OutputDirOption
from loki.cli.run import show_run


def demo(
    output_dir: OutputDirOption = None,
    force: ForceOption = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the settings and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole road on SmolLM2-135M: teach it to call functions, and see what it forgot.

    Example: loki demo
    """
    from importlib import resources

    from loki.run_settings import load_settings

    with resources.as_file(resources.files("loki").joinpath("configs/demo.yaml")) as path:
        if print_config:
            print(path.read_text(encoding="utf-8"), end="")
            return
        settings = load_settings(path, output_dir=output_dir)
    show_run(settings, force=force, as_json=as_json)
