"""Recipes for LlamaFactory: their settings, what `train.sh` starts, and what the check of them takes for correct."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "lf_config"
FILES = {"ToolACE": "toolace.yaml", "Reranker": "reranker.yaml"}
TO_FILL_IN = ("model_name_or_path", "deepspeed", "output_dir")
# As the public implementation has them.
SHARED = {
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "cutoff_len": 8192,
    "preprocessing_num_workers": 20,
    "overwrite_output_dir": True,
    "logging_steps": 1,
    "save_steps": 0.99999,
    "plot_loss": True,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "ddp_timeout": 180000000,
}
OWN = {
    "ToolACE": {
        "dataset": "ToolACE",
        "template": "llama3",
        "overwrite_cache": True,
        "packing": False,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3.0,
        "warmup_ratio": 0.1,
    },
    "Reranker": {
        "dataset": "reranker_continuous_filt_max7_train",
        "template": "qwen",
        "overwrite_cache": False,
        "packing": True,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1.0,
        "warmup_ratio": 0.01,
        "val_size": 0.01,
        "per_device_eval_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 0.1,
    },
}
HUB_IDS = {"ToolACE": "Team-ACE/ToolACE", "Reranker": "lightblue/reranker_continuous_filt_max7_train"}


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_llamafactory", ROOT / "scripts" / "check_llamafactory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", FILES)
class TestSettings:
    def test_are_those_of_the_public_implementation(self, recipe):
        settings = yaml.safe_load((RECIPES / recipe / FILES[recipe]).read_text())
        filled = {name: value for name, value in settings.items() if name not in TO_FILL_IN}
        assert filled == {**SHARED, **OWN[recipe]}

    def test_fields_to_fill_in_are_marked(self, recipe):
        settings = yaml.safe_load((RECIPES / recipe / FILES[recipe]).read_text())
        marked = [name for name, value in settings.items() if isinstance(value, str) and value.startswith("(")]
        assert marked == list(TO_FILL_IN)

    def test_dataset_is_described_beside_them(self, recipe):
        info = json.loads((RECIPES / recipe / "dataset_info.json").read_text())
        entry = info[OWN[recipe]["dataset"]]
        assert (entry["hf_hub_url"], entry["formatting"]) == (HUB_IDS[recipe], "sharegpt")


def test_roles_of_toolace_are_named():
    tags = json.loads((RECIPES / "ToolACE" / "dataset_info.json").read_text())["ToolACE"]["tags"]
    assert [tags[f"{who}_tag"] for who in ("user", "assistant", "observation")] == ["user", "assistant", "tool"]


class Shell:
    """`train.sh` with stand-ins for the programs that it starts: they write down folder and arguments."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.factory, self.record = folder / "bin", folder / "Llama Factory", folder / "record.json"
        self.programs.mkdir()
        (self.factory / "data").mkdir(parents=True)
        (self.factory / "data" / "dataset_info.json").write_text("{}")
        for name in ("llamafactory-cli", "python", "torchrun"):
            program = self.programs / name
            program.write_text(
                f"#!{sys.executable}\nimport json, os, sys\n"
                f"json.dump([{name!r}, os.getcwd(), sys.argv[1:]], open({str(self.record)!r}, 'w'))\n"
            )
            program.chmod(0o755)

    def run(self, script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        known = {"PATH": path, "LLAMA_FACTORY_PATH": str(self.factory)}
        return subprocess.run([script, *arguments], env={**known, **variables}, capture_output=True, text=True)

    def started(self) -> tuple[str, Path, list[str]]:
        program, folder, arguments = json.loads(self.record.read_text())
        return program, Path(folder), arguments


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)


VALUES = ("model_name_or_path=/a model", "output_dir=/out", "deepspeed=null")


@pytest.mark.parametrize("recipe", FILES)
class TestTrainScript:
    def test_starts_llamafactory_in_its_folder(self, recipe, shell):
        done = shell.run(RECIPES / recipe / "train.sh", *VALUES)
        assert (done.returncode, done.stderr) == (0, "")
        folder = RECIPES / recipe
        given = ["train", str(folder / FILES[recipe]), f"dataset_dir={folder}", *VALUES]
        assert shell.started() == ("llamafactory-cli", shell.factory, given)

    def test_leaves_llamafactory_data_alone(self, recipe, shell):
        shell.run(RECIPES / recipe / "train.sh", *VALUES)
        assert [path.name for path in shell.factory.rglob("*")] == ["data", "dataset_info.json"]
        assert (shell.factory / "data" / "dataset_info.json").read_text() == "{}"

    def test_adapter_is_trained_with_loki_imported(self, recipe, shell):
        values = (*VALUES, "adapter_name_or_path=/untrained")
        assert shell.run(RECIPES / recipe / "train.sh", *values).returncode == 0
        folder = RECIPES / recipe
        entry = str(RECIPES / "train_adapter.py")
        given = [entry, str(folder / FILES[recipe]), f"dataset_dir={folder}", "finetuning_type=lora", *values]
        assert shell.started() == ("python", shell.factory, given)

    @pytest.mark.parametrize("field", TO_FILL_IN)
    def test_refuses_a_field_that_is_not_filled_in(self, recipe, field, shell):
        values = [value for value in VALUES if not value.startswith(field)]
        done = shell.run(RECIPES / recipe / "train.sh", *values, f"other_{field}=x")
        assert done.returncode == 2
        file = RECIPES / recipe / FILES[recipe]
        expected = f"{field} in {file} is not filled in: write a value in place of (), or give {field}=…\n"
        assert done.stderr == expected
        assert not shell.record.exists()

    def test_refuses_without_the_path_of_llamafactory(self, recipe, shell):
        done = shell.run(RECIPES / recipe / "train.sh", *VALUES, LLAMA_FACTORY_PATH="")
        assert done.returncode == 2
        assert done.stderr == "LLAMA_FACTORY_PATH is not set: name the folder of LlamaFactory's checkout\n"


def test_launcher_of_adapters_can_be_chosen(shell):
    values = (*VALUES, "adapter_name_or_path=/untrained")
    done = shell.run(RECIPES / "ToolACE" / "train.sh", *values, LAUNCHER="torchrun --nproc-per-node 2")
    assert done.returncode == 0
    program, _, arguments = shell.started()
    assert (program, arguments[:2]) == ("torchrun", ["--nproc-per-node", "2"])
    assert arguments[2:4] == [str(RECIPES / "train_adapter.py"), str(RECIPES / "ToolACE" / "toolace.yaml")]


def test_filled_in_file_needs_no_values(shell, tmp_path):
    recipe = tmp_path / "my data"
    shutil.copytree(RECIPES / "ToolACE", recipe)
    file = recipe / "toolace.yaml"
    text = file.read_text().replace("()", "/somewhere").replace("(examples/", "examples/").replace(".json)", ".json")
    file.write_text(text)
    done = shell.run(RECIPES / "train.sh", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert shell.started()[2] == ["train", str(file), f"dataset_dir={recipe}"]


class TestComparison:
    """What `scripts/check_llamafactory.py` takes for correct."""

    NAME = "model.layers.{}.mlp.down_proj.weight"

    @pytest.fixture
    def folders(self, check, tmp_path):
        """A base, and a result with every selected row changed."""
        base, result = tmp_path / "base", tmp_path / "result"
        tensors = {self.NAME.format(layer): torch.ones(16, 4, dtype=torch.bfloat16) for layer in range(3)}
        tensors["model.norm.weight"] = torch.zeros(16, dtype=torch.bfloat16)
        for folder in (base, result):
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors")
        for layer, rows in enumerate(check.POSITIONS):
            for row in rows:
                self.change(result, self.NAME.format(layer), (row, 1), 2)
        return base, result

    def change(self, folder: Path, name: str, place: object, value: float) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
        tensors[name][place] = value
        save_file(tensors, folder / "model.safetensors")

    def test_counts_the_rows(self, check, folders):
        assert check.require_only_rows_changed(*folders) == 7

    @pytest.mark.parametrize("layer", [0, 1])
    def test_refuses_a_row_that_was_not_selected(self, check, folders, layer):
        self.change(folders[1], self.NAME.format(layer), (5, 0), 1.0078125)  # the next bfloat16 number after 1
        with pytest.raises(SystemExit, match=rf"rows \[.*5.*\] of {self.NAME.format(layer)} changed"):
            check.require_only_rows_changed(*folders)

    def test_refuses_a_selected_row_that_did_not_change(self, check, folders):
        self.change(folders[1], self.NAME.format(0), (7, 1), 1)
        with pytest.raises(SystemExit, match=r"rows \[1, 15\] of .* changed, \[1, 7, 15\] were selected"):
            check.require_only_rows_changed(*folders)

    def test_compares_bits(self, check, folders):
        self.change(folders[1], "model.norm.weight", 3, -0.0)
        with pytest.raises(SystemExit, match=r"rows \[3\] of model\.norm\.weight changed, \[\] were selected"):
            check.require_only_rows_changed(*folders)

    def test_refuses_other_tensors(self, check, folders):
        tensors = load_file(folders[1] / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folders[1] / "model.safetensors")
        with pytest.raises(SystemExit, match=r"has other tensors than .*: \['model\.norm\.weight'\]"):
            check.require_only_rows_changed(*folders)

    def test_refuses_another_dtype(self, check, folders):
        tensors = load_file(folders[1] / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        save_file(tensors, folders[1] / "model.safetensors")
        with pytest.raises(SystemExit, match=r"model\.norm\.weight is torch\.float32 \(16,\), it was torch\.bfloat16"):
            check.require_only_rows_changed(*folders)

    def test_refuses_missing_steps(self, check, tmp_path):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0}, {"runtime": 2.0}]}))
        with pytest.raises(SystemExit, match="logged 1 steps, 4 were asked for"):
            check.require_trained(tmp_path)


def test_invented_rows_use_the_tags_of_the_recipe(check, tmp_path):
    roles = {}
    for recipe in FILES:
        folder = check.write_data(RECIPES / recipe, tmp_path / recipe)
        entry = json.loads((folder / "dataset_info.json").read_text())[OWN[recipe]["dataset"]]
        published = json.loads((RECIPES / recipe / "dataset_info.json").read_text())[OWN[recipe]["dataset"]]
        file = entry.pop("file_name")
        assert entry == {name: value for name, value in published.items() if name != "hf_hub_url"}
        rows = json.loads((folder / file).read_text())
        roles[recipe] = {turn["from"] for row in rows for turn in row["conversations"]}
    assert roles == {"ToolACE": {"user", "assistant", "tool"}, "Reranker": {"human", "gpt"}}
