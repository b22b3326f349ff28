"""One settings file to one run directory: analyse, select, train, merge, evaluate, report.

Every stage leaves its files and its result (`<stage>.json`) in the run directory. A stage whose result is
there is not run again; an interrupted stage goes on where it stopped; a directory made by other settings is
refused.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loki.architecture import shape_of_config
from loki.errors import ArtefactError, InputError
from loki.models import load_config, load_tokenizer, locate_model
from loki.progress import Track, silent
from loki.provenance import digest, read_json, require_writable_parent, write_json
from loki.results import Result
from loki.run_settings import RunSettings
from loki.stages import REPORT_FILE, STAGES, SUMMARY_FILE, Run, StageName, report, summarise
from loki.training import texts
from loki.training.examples import BUILT_IN, load_examples

RUN_FILE = "run.json"


def run_pipeline(
    settings: RunSettings,
    *,
    force: bool = False,
    track: Track = silent,
    announce: Callable[[StageName, bool], None] = lambda _stage, _finished: None,
) -> Result:
    """Run all stages that are not finished; return the summary, which is also in `summary.json`.

    `announce(stage, finished)` is called before each stage. `force` starts from nothing in a directory that
    an earlier run made. When a stage has to run, those behind it run too.

    Raises:
        ArtefactError: the directory was made by other settings or another model, or is no run directory.
        LokiError: as the stages.
    """
    run = Run(settings, track)
    _check_inputs(settings)
    _open_directory(run, force=force)
    earlier_finished = True
    for stage in STAGES:
        result_path = run.directory / f"{stage.name}.json"
        finished = earlier_finished and result_path.exists() and all(path.exists() for path in stage.outputs(run))
        announce(stage.name, finished)
        if not finished:
            earlier_finished = False
            _remove([result_path, *stage.outputs(run), run.directory / SUMMARY_FILE, run.directory / REPORT_FILE])
            started = time.monotonic()
            outcome = stage.work(run)
            figures = {**outcome.figures, "seconds": round(time.monotonic() - started, 1)}
            Result(stage.name, settings.as_dict(), figures, outcome.comparisons, settings.seed).save(result_path)
    summary = summarise(run)
    report(run.directory)
    return summary


def run_record(settings: RunSettings) -> dict[str, Any]:
    """What has to be equal for a directory to be this run's: settings, the model's weights, the data's content."""
    paths = [settings.train.data, settings.evaluate.completions, settings.train.row_rates]
    for anchor in (settings.train.budget, settings.train.preserve):
        if anchor is not None and isinstance(anchor.text, str):
            paths.append(anchor.text)
    return {
        "settings": settings.as_dict(),
        "model_files": _model_files(settings.model),
        "data_files": {
            path: hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()[:16]
            for path in paths
            if path not in (None, BUILT_IN, texts.BUILT_IN)
        },
    }


def _check_inputs(settings: RunSettings) -> None:
    """Refuse a model of unknown architecture and data that cannot be read before hours are spent."""
    config = load_config(settings.model, trust_remote_code=settings.trust_remote_code)
    shape_of_config(config)
    load_examples(settings.train.data, count=settings.train.examples, seed=settings.seed)
    if settings.train.budget is not None:
        settings.train.budget.budget()
    if settings.train.row_rates is not None:
        from loki.training.row_rates import RowRates

        RowRates(settings.train.row_rates)
    if settings.train.preserve is not None:
        preserve = settings.train.preserve.preserve()
        preserve.read_with(load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code))
        if settings.train.steps is not None:
            preserve.require_pass_within(settings.train.steps)
    if settings.evaluate.completions is not None:
        load_examples(settings.evaluate.completions, count=None, seed=settings.seed)


def _open_directory(run: Run, *, force: bool) -> None:
    """Create the run directory, or make sure that it belongs to these settings.

    The record of settings is removed last and written first, so that a directory of ours stays known as such.
    """
    directory, record_path = run.directory, run.directory / RUN_FILE
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output folder {directory} is a file: choose another one")
    record = run_record(run.settings)
    if record_path.exists():
        found = read_json(record_path, what="run record")
        changed = _differences(found, record)
        if changed and not force:
            raise ArtefactError(
                f"run directory {directory} was made with other settings ({'; '.join(changed)}): "
                "choose another --output-dir, or start it anew with --force"
            )
        if force:
            _remove([*_files_of(run), *_files_of(_earlier_run(run, found))])
    elif directory.exists() and any(directory.iterdir()):
        raise ArtefactError(f"{directory} is not empty and not a run directory: choose another --output-dir")
    require_writable_parent(record_path)
    # What a killed run was writing aside: `.kva.h5.x1y2` for `kva.h5`. Anything else with a dot is the user's.
    ours = {RUN_FILE, *(path.name for path in _files_of(run))}
    _remove([path for path in directory.glob(".*") if path.name[1:].rpartition(".")[0] in ours])
    write_json(record_path, record)


def _earlier_run(run: Run, record: Any) -> Run:
    """The run that a record speaks of: its positions file may have another name."""
    try:
        return Run(RunSettings.model_validate({**record["settings"], "output_dir": run.directory}))
    except (ValidationError, KeyError, TypeError):
        return run


def _files_of(run: Run) -> list[Path]:
    """Everything that a run leaves, finished or not, but its record."""
    names = [SUMMARY_FILE, REPORT_FILE]
    for stage in STAGES:
        names += [f"{stage.name}.json", *([stage.unfinished] if stage.unfinished else [])]
    return [*(run.directory / name for name in names), *(path for stage in STAGES for path in stage.outputs(run))]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _model_files(name_or_path: str) -> str:
    """Digest of the names, sizes and times of a model folder's weights; a Hub id stands for itself."""
    source = Path(locate_model(name_or_path))
    if not source.is_dir():
        return str(source)
    files = sorted([*source.glob("*.safetensors"), source / "config.json"])
    return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def _differences(found: Any, expected: Mapping[str, Any]) -> list[str]:
    """Settings that differ, as `train.steps 60 there, 70 here`."""
    there, here = _flat(found), _flat(expected)
    return [
        f"{name.removeprefix('settings.')} {there.get(name)} there, {here.get(name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    return {name: leaf for key, part in value.items() for name, leaf in _flat(part, f"{prefix}{key}.").items()}
