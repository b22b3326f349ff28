"""The report page: one self-contained file that shows a run or an attribution log."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from loki.errors import InputError
from loki.provenance import write_text
from loki.reporting.comparison import table_row
from loki.reporting.content import Content
from loki.reporting.data import ReportData
from loki.reporting.drawing import MISSING_PACKAGES
from loki.reporting.entries import Entry, entries_of, stage_entries
from loki.reporting.interactive import map_place
from loki.reporting.sections import make_content


def render_report(data: ReportData) -> str:
    """The page as HTML, without a reference to anything outside it.

    Raises:
        InputError: matplotlib or jinja2 is missing.
        ArtefactError: a selection does not fit the log.
    """
    return _render(data, _content(data))


def write_report(path: Path, data: ReportData, *, figures_dir: Path | None = None) -> list[Path]:
    """Write the page, whole or not at all, and with `figures_dir` each figure as PNG and SVG; returns these.

    Raises:
        InputError, ArtefactError: as `render_report`.
        OutputError: a folder cannot be written.
    """
    content = _content(data)
    write_text(path, _render(data, content))
    if figures_dir is None:
        return []
    pictures = [item for section in content.sections for item in section.pictures.items()]
    return [path for name, picture in pictures for path in picture.save(figures_dir / name)]


def _content(data: ReportData) -> Content:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(MISSING_PACKAGES) from error
    return make_content(data)


def _render(data: ReportData, content: Content) -> str:
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loki.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # What we make ourselves (drawings with escaped labels, script, style, JSON); everything else is escaped here.
    environment.filters["made"] = markupsafe.Markup
    environment.filters["map_place"] = map_place
    script = _template_file("maps.js")
    with_pictures = [section.name for section in content.sections if section.pictures]
    return environment.get_template("report.html.j2").render(
        title=data.title,
        model_label=data.model_label,
        wording=data.wording,
        site_module="down_proj" if data.survey is None else data.survey.site_module,
        glance=content.glance,
        rows=[table_row(comparison) for comparison in data.summary.comparisons] if data.summary else [],
        sections=content.sections,
        numbers={name: number for number, name in enumerate(with_pictures, 1)},
        stages=stage_entries(data.summary.figures) if data.summary else [],
        provenance=_provenance(data),
        style=_template_file("report.css"),
        script=script,
        script_data=content.script_data,
        script_source=_hash_source(script) if content.script_data else "'none'",
    )


def _provenance(data: ReportData) -> list[Entry]:
    parts = dict(data.provenance)
    if data.summary is not None:
        parts |= {"settings": data.summary.settings, "versions": data.summary.versions}
        if data.summary.seed is not None:
            parts["seed"] = {"seed": data.summary.seed}
    entries = [Entry(name, entries=entries_of(values, exact=True)) for name, values in parts.items()]
    return [entry for entry in entries if entry.entries]


def _hash_source(script: str) -> str:
    """The Content-Security-Policy source that allows exactly this script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _template_file(name: str) -> str:
    return resources.files("loki.reporting").joinpath("templates", name).read_text(encoding="utf-8")
