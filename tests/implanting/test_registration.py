"""PEFT knows the method after `import loki`, in either import order, and the import is cheap."""

import subprocess
import sys

import pytest

CHECK = "import peft; assert peft.get_peft_config({'peft_type': 'LOKI', 'positions': [[1]]}).positions == [[1]]"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peft_knows_the_method():
    """Each order in a child of a process that has what PEFT imports, which takes most of the time."""
    orders = [
        "import loki",
        "import peft; import loki",
        "import loki; import peft; import loki",
        # transformers probes for peft without importing it
        "import loki, importlib.util; importlib.util.find_spec('peft')",
    ]
    run_python(
        "import os, sys\n"
        "from transformers import PreTrainedModel\n"
        "assert not {'loki', 'peft'} & set(sys.modules)\n"
        f"for order in {orders}:\n"
        "    if os.fork() == 0:\n"
        f"        exec(order + {'; ' + CHECK!r})\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0, order\n"
    )


def test_the_hook_leaves_no_trace():
    code = (
        "import sys, loki, peft; from importlib import resources;"
        "assert type(peft.__loader__).__name__ == 'SourceFileLoader', peft.__loader__;"
        "assert peft.__spec__.loader is peft.__loader__;"
        "assert not any('loki' in type(finder).__module__ for finder in sys.meta_path);"
        "print(resources.files('peft').joinpath('__init__.py').is_file())"
    )
    assert run_python(code).strip() == "True"


def test_importing_the_package_imports_neither_torch_nor_peft():
    run_python("import sys, loki; assert not {'torch', 'peft', 'transformers', 'numpy'} & set(sys.modules)")


def test_an_unknown_name_is_an_attribute_error():
    import loki

    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = loki.nonsense
    assert set(loki.__all__) <= set(dir(loki))
