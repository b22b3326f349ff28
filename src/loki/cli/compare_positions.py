"""`loki compare-positions`: what selections have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loki.cli.options import JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from loki.selection.overlap import Overlap, SelectionOverlap


def compare_positions(
    positions: Annotated[list[Path], typer.Argument(help="Two or more positions files for one model.")],
    layers: Annotated[
        bool | None,
        typer.Option(
            "--layers/--no-layers",
            help="A table of every layer; shown for two files when left out.",
            show_default=False,
        ),
    ] = None,
    num_rows: Annotated[
        int | None, typer.Option(help="Rows of a layer (hidden size), for files without provenance.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model that the files are for; tells the rows of a layer.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare selections: rows in common, in all and per layer, against what chance would give.

    Chance: each file draws as many rows as it has in every layer, at random. z counts standard deviations from there.

    Example: loki compare-positions 10.json 20.json
    """
    from rich.console import Console
    from rich.markup import escape

    from loki.architecture import shape_of_config
    from loki.cli.show import notes, print_json
    from loki.models import load_config
    from loki.results import Result
    from loki.selection.overlap import load_comparable, overlap

    paths = _without_provenance(positions)
    shape = shape_of_config(load_config(model)) if model is not None else None
    selections, found_rows = load_comparable(paths, num_rows=num_rows, shape=shape)
    pairs = {
        (first, second): overlap([selections[first], selections[second]], found_rows)
        for first, second in combinations(range(len(paths)), 2)
    }
    common = overlap(selections, found_rows)
    if as_json:
        figures = {
            "num_layers": selections[0].num_layers,
            "num_rows": found_rows,
            "pairs": [
                {"positions": [str(paths[first]), str(paths[second])], **pair.as_dict()}
                for (first, second), pair in pairs.items()
            ],
            "common_to_all": common.as_dict(),
        }
        settings = {"positions": [str(path) for path in paths], "num_rows": num_rows, "model": model}
        print_json(Result("compare", settings, figures))
    else:
        names = [escape(name) for name in _short_names(paths)]
        console = Console(highlight=False)
        if len(paths) == 2:
            console.print(_pair_table(names, common.total))
        else:
            what = ", and below it what chance gives" if common.total.chance else ""
            console.print(f"share of each file's rows that another file has too{what}", soft_wrap=True)
            console.print(_matrix_table(names, pairs, common.total))
        console.print(f"{_in_words(common.total, len(paths))}\n", soft_wrap=True)
        if layers if layers is not None else len(paths) == 2:
            console.print(_layers_table(names, pairs, common))
    if found_rows is None:
        notes.print(
            "chance is not known, because no file tells the rows of a layer: "
            "give --num-rows (the hidden size) or --model"
        )


def _without_provenance(paths: Sequence[Path]) -> list[Path]:
    """Files without the `.meta.json` of any of them, which a shell's `*.json` brings along."""
    from loki.rows import meta_path

    provenance = {meta_path(path) for path in paths}
    return [path for path in paths if path not in provenance]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell different paths apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return [str(Path(*path.parts[-depth:])) for path in paths]


def _pair_table(names: Sequence[str], total: Overlap) -> Table:
    """Two files, one a line."""
    table = _table()
    table.add_column("", overflow="fold")
    for column in ("rows", "in the other", *(["by chance"] if total.chance else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for index, (name, count, share) in enumerate(zip(names, total.counts, total.shares_percent, strict=True), 1):
        chance = [_percent(100 * total.chance.expected / count)] if total.chance else []
        table.add_row(f"{index}  {name}", f"{count:,}", _percent(share), *chance)
    return table


def _matrix_table(names: Sequence[str], pairs: dict[tuple[int, int], SelectionOverlap], total: Overlap) -> Table:
    """More files: for each its share of rows that another has too, and below it what chance gives."""
    table = _table()
    table.add_column("", overflow="fold")
    for column in ("rows", *(f"in {index}" for index in range(1, len(names) + 1))):
        table.add_column(column, justify="right", no_wrap=True)
    for row, name in enumerate(names):
        cells = []
        for other in range(len(names)):
            if other == row:
                cells.append("·")
                continue
            found = pairs[min(row, other), max(row, other)].total
            place = int(row > other)
            chance = (
                f"\n[dim]{_percent(100 * found.chance.expected / found.counts[place])}[/dim]" if found.chance else ""
            )
            cells.append(_percent(found.shares_percent[place]) + chance)
        table.add_row(f"{row + 1}  {name}", f"{total.counts[row]:,}", *cells)
    return table


def _in_words(total: Overlap, num_files: int) -> str:
    who = "both" if num_files == 2 else f"all {num_files}"
    text = f"{total.num_common:,} rows in {who}, Jaccard index {total.jaccard:.3f}"
    if total.chance:
        text += f"; by chance {total.chance.expected:,.1f} ± {total.chance.standard_deviation:.1f} rows"
        text += f", z = {_z(total)}" if total.z_score is not None else ""
    return text


def _layers_table(
    names: Sequence[str], pairs: dict[tuple[int, int], SelectionOverlap], common: SelectionOverlap
) -> Table:
    """Rows in common in every layer: of two files in full, of more for every pair and for all."""
    table = _table()
    table.add_column("layer", justify="right")
    if len(names) == 2:
        columns = ["rows in 1", "in 2", "in both", "share of 1", "of 2", "by chance", "z"]
    else:
        columns = [*(f"{first + 1} ∩ {second + 1}" for first, second in pairs), "in all", "by chance", "z"]
    for column in columns if common.total.chance else columns[:-2]:
        table.add_column(column, justify="right", no_wrap=True)
    for layer, found in enumerate(common.layers):
        cells = [f"{found.num_common:,}"]
        if len(names) == 2:
            cells = [f"{count:,}" for count in found.counts] + cells + [_percent(s) for s in found.shares_percent]
        else:
            cells = [f"{pair.layers[layer].num_common:,}" for pair in pairs.values()] + cells
        if found.chance:
            cells += [f"{found.chance.expected:.1f} ± {found.chance.standard_deviation:.1f}", _z(found)]
        table.add_row(str(layer), *cells)
    return table


def _table() -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    return Table(header_style="bold", box=SIMPLE, pad_edge=False)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def _z(found: Overlap) -> str:
    return "" if found.z_score is None else f"{found.z_score:+.1f}"
