"""The attribution logs of a study, made once and resumable, and the rows that are selected from them."""

from __future__ import annotations

from pathlib import Path

from loki.analysis.run import AnalysisOptions, analyse
from loki.architecture import Shape
from loki.choices import ModuleName
from loki.errors import ArtefactError
from loki.log.reader import AttributionLog
from loki.models import load_model, load_tokenizer, model_label
from loki.progress import Track, silent
from loki.rows import RowSelection
from loki.selection.candidates import candidate_rows
from loki.selection.strategies import Election, select_all
from loki.study.corpora import load_corpora
from loki.study.settings import MethodSection, RowsSection, StudySettings

BETWEEN_SEEDS = 1000
"""Between the seed of one projection's random rows and the next one's, so that no run draws the same rows for both."""


def log_path(folder: Path, name: str) -> Path:
    """Where an analysis is kept."""
    return folder / f"{name}.h5"


def make_log(settings: StudySettings, name: str, folder: Path, *, track: Track = silent) -> None:
    """Attribute the prompts of one analysis; one that is complete is left as it is."""
    analysis = settings.analyses[name]
    analyse(
        load_model(
            settings.model, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
        ),
        load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code),
        load_corpora(analysis, settings.data_dir),
        analysis.settings(),
        log_path(folder, name),
        model_name=model_label(settings.model),
        prompt_set="+".join(analysis.corpora),
        options=AnalysisOptions(batch_size=analysis.batch_size),
        track=track,
    )


def load_selections(
    method: MethodSection, settings: StudySettings, folder: Path, shape: Shape, seed: int
) -> dict[ModuleName, RowSelection]:
    """A method's rows by projection, selected from logs, or at random by `seed`, of each projection others.

    Raises:
        ArtefactError: a log is not there.
    """
    sections = method.rows_by_module
    return {
        module: _selection(rows, settings, folder, shape, seed + number * BETWEEN_SEEDS)
        for number, (module, rows) in enumerate(sections.items())
    }


def _selection(rows: RowsSection, settings: StudySettings, folder: Path, shape: Shape, seed: int) -> RowSelection:
    candidates_LD = candidate_rows(shape.num_layers, shape.num_rows, layers=rows.layers)
    election = Election.of(rows.strategy, rows.quota, candidates_LD, seed=seed)
    if rows.log is None:
        return select_all(None, [election])[0].rows
    path = log_path(folder, rows.log)
    if not path.is_file():
        raise ArtefactError(f"attribution log {path} does not exist: run the study's analyses first")
    with AttributionLog(path) as log:
        return select_all(log, [election])[0].rows
