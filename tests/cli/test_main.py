"""The command line as a whole."""

import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

COMMANDS = [
    "demo",
    "run",
    "analyse",
    "merge-logs",
    "select-nodes",
    "compare-positions",
    "train",
    "merge",
    "dial",
    "uninstall",
    "create-model",
    "restore-model",
    "export-lora",
    "suppress",
    "evaluate",
    "study",
    "report",
    "info",
]


def test_help_lists_every_command(loki):
    done = loki("--help")
    assert done.code == 0
    assert re.findall(r"^│ ([a-z][a-z-]+) ", done.out, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(loki, command):
    done = loki(command, "--help")
    assert done.code == 0
    assert f"Example: loki {command}" in done.out


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['loki', '--help']\n"
        "from loki.cli.main import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'h5py', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor, so that other work on the machine does not count.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.5


def test_version(loki):
    assert loki("--version").out.startswith("loki-peft ")


def test_underscores_in_options_are_accepted(loki, tmp_path):
    hyphens = loki("select-nodes", "--hdf5-path", tmp_path / "no_such.h5", "--output-dir", tmp_path)
    underscores = loki("select-nodes", "--hdf5_path", tmp_path / "no_such.h5", f"--output_dir={tmp_path}")
    assert hyphens == underscores
    assert "no_such.h5 does not exist" in hyphens.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["analyse"], "Missing argument 'model'"),
        (["analyse", "m", "--steps", "many"], "Invalid value for '--steps'"),
        (["analyse", "m", "--rule", "simpson"], "'riemann_trapezoid', 'gausslegendre'"),
        (["merge", "--colour"], "No such option"),
    ],
)
def test_usage_errors_are_one_line_with_exit_code_2(loki, arguments, message):
    done = loki(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_an_error_is_one_write(monkeypatch):
    """So that lines of several processes come out whole."""
    from loki.cli.main import run

    written = []
    monkeypatch.setattr(sys, "argv", ["loki", "nonsense"])
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    with pytest.raises(SystemExit):
        run()
    (line,) = written
    assert line.startswith("loki: No such command 'nonsense'")
    assert line.endswith("\n")


def test_debug_shows_the_traceback(monkeypatch):
    from loki.cli.main import run
    from loki.errors import InputError

    monkeypatch.setattr(sys, "argv", ["loki", "merge", "--model=/no", "--adapter=x", "--output-dir=y", "--debug"])
    with pytest.raises(InputError, match="model folder '/no' does not exist"):
        run()
