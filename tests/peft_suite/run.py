"""Runs PEFT's own tests with our configs: `make peft-suite`.

The tests are those of the installed version, out of its source distribution, which pip fetches once.
Needs no Hub: the models that the tests name are made here, tiny and random.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
MODULES = ("test_config.py", "test_custom_models.py", "test_decoder_models.py")


def fetch_tests(cache: Path) -> Path:
    """Folder with the tests of the installed PEFT, as a package `tests`."""
    peft = version("peft")
    folder = cache / f"peft-{peft}"
    if not (folder / "tests/__init__.py").exists():
        with tempfile.TemporaryDirectory() as directory:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, f"peft=={peft}", "--dest", directory], check=True)
            (archive,) = Path(directory).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                wanted = [member for member in tar.getmembers() if "/tests/" in member.name]
                tar.extractall(cache, members=wanted, filter="data")
        (folder / "tests/__init__.py").touch()  # the source distribution leaves the empty file out
    return folder


def main() -> int:
    """Fetch, build the models, run pytest with the plugin; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(sys.prefix) / "peft-suite", help="where downloads stay")
    parser.add_argument("pytest_arguments", nargs="*", help="after `--`, such as -k merge")
    arguments = parser.parse_args()
    folder = fetch_tests(arguments.cache)
    sys.path[:0] = [str(HERE.parent)]
    from peft_suite.cases import write_models

    write_models(folder)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    (folder / "pytest.ini").write_text("[pytest]\n")
    options = ["-q", "-p", "peft_suite.plugin", "-p", "frozen", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    paths = [f"tests/{module}" for module in MODULES]
    command = [sys.executable, "-m", "pytest", *options, *arguments.pytest_arguments, *paths]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
