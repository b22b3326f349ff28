"""The attribution logs of a study, made once and resumable, and the rows that are selected from them."""

from __future__ import annotations

from pathlib import Path

from loki.analysis.run import AnalysisOptions, analyse
from loki.architecture import Shape
from loki.errors import ArtefactError
from loki.log.reader import AttributionLog
from loki.models import load_model, load_tokenizer, model_label
from loki.progress import Track, silent
from loki.rows import RowSelection
from loki.selection.candidates import candidate_rows
from loki.selection.strategies import Election, select_all
from loki.study.corpora import load_corpora
from loki.study.settings import RowsSection, StudySettings


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


def load_selection(
    rows: RowsSection | None, settings: StudySettings, folder: Path, shape: Shape, seed: int
) -> RowSelection:
    """Select rows from a log, or at random by `seed`.

    Raises:
        ArtefactError: the log is not there.
    """
    assert rows is not None
    candidates_LD = candidate_rows(shape.num_layers, shape.num_rows, layers=rows.layers)
    election = Election.of(rows.strategy, rows.quota, candidates_LD, seed=seed)
    if rows.log is None:
        return select_all(None, [election])[0].rows
    path = log_path(folder, rows.log)
    if not path.is_file():
        raise ArtefactError(f"attribution log {path} does not exist: run the study's analyses first")
    with AttributionLog(path) as log:
        return select_all(log, [election])[0].rows
