import pytest
import typer
from typer.testing import CliRunner

from loki.cli.merge_logs import merge_logs
from loki.errors import ArtefactError, OutputError

app = typer.Typer(pretty_exceptions_enable=False)
app.command("merge-logs")(merge_logs)


@pytest.fixture
def shards(tmp_path, scores):
    return scores.write_shards(tmp_path, 2)


def run(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_shards_become_one_log(tmp_path, scores, shards, read_datasets):
    done = run(*shards, "--output", tmp_path / "kva.h5")
    assert done.exit_code == 0
    assert "kva.h5: 5 prompts from 2 logs" in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert read_datasets(tmp_path / "kva.h5") == read_datasets(scores.write_log(tmp_path / "single.h5"))


def test_the_default_output_is_that_of_analyse(tmp_path, shards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*shards)
    assert (tmp_path / "kva.h5").exists()


def test_an_existing_log_is_replaced_with_force_only(tmp_path, shards):
    output = tmp_path / "kva.h5"
    run(*shards, "--output", output)
    with pytest.raises(OutputError, match=r"exists already.* add --force"):
        run(*shards, "--output", output)
    run(*shards, "--output", output, "--force")


def test_an_incomplete_set_is_refused(tmp_path, shards):
    with pytest.raises(ArtefactError, match="shard 2/2 is missing"):
        run(shards[0], "--output", tmp_path / "kva.h5")
    assert not (tmp_path / "kva.h5").exists()


def test_help_has_an_example(tmp_path):
    assert "loki merge-logs kva-1.h5 kva-2.h5 --output kva.h5" in " ".join(run("--help").stdout.split())


def test_no_logs_are_refused():
    assert run().exit_code == 2
