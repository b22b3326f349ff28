"""Loading a causal language model and its tokenizer: one place for device, dtype and safety."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from safetensors import SafetensorError

from loki.architecture import decoder_layers
from loki.choices import DtypeName
from loki.embedded import EMBEDDED_LABEL, EMBEDDED_NAME, embedded_model_directory
from loki.errors import InputError
from loki.provenance import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def locate_model(name_or_path: str) -> str:
    """A folder or Hub id that `transformers` can load: the user's own, or the embedded model's folder.

    Raises:
        InputError: a path that does not exist, or a folder without `config.json`.
    """
    if name_or_path == EMBEDDED_NAME:
        return str(embedded_model_directory())
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {name_or_path!r} has no config.json: name a Hugging Face model folder")
        return str(path)
    if path.exists():
        raise InputError(f"model {name_or_path!r} is a file: name the Hugging Face model folder that holds it")
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise InputError(
            f"model folder {name_or_path!r} does not exist: name a Hugging Face model folder, "
            f"a Hub id (owner/name), or {EMBEDDED_NAME!r}"
        )
    return name_or_path


def default_device() -> torch.device:
    """The accelerator that torch finds, or the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def resolve_device(name: str | None) -> torch.device:
    """A device by name, or the default one.

    Raises:
        InputError: a name that torch does not know, or a device that is not there.
    """
    import torch

    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown: give one such as cpu, cuda or cuda:1") from error
    try:
        torch.empty(1, device=device).cpu()  # a copy, because `meta` has nothing to copy
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: leave --device out, or give cpu") from error
    return device


def model_label(name_or_path: str) -> str:
    """The model's name for people; the embedded one says that it was quantised."""
    return EMBEDDED_LABEL if name_or_path == EMBEDDED_NAME else name_or_path


def resolve_dtype(dtype: DtypeName, device: torch.device | None = None) -> torch.dtype:
    """`auto` is float32 on the CPU and bfloat16 on an accelerator.

    Raises:
        InputError: an unknown name.
    """
    import torch

    if dtype not in get_args(DtypeName):
        raise InputError(f"dtype {dtype!r} is unknown: choose one of {', '.join(get_args(DtypeName))}")
    if dtype == "auto":
        place = device or default_device()
        return torch.float32 if place.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_model(
    name_or_path: str,
    *,
    dtype: DtypeName = "auto",
    device: str | None = None,
    device_map: str | None = None,
    offload_dir: Path | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, from safetensors only.

    `device_map` is a strategy of `accelerate` (auto, balanced, balanced_low_0, sequential) or a JSON file that
    maps module names to devices (`cpu`, `disk`, `cuda:0`); `offload_dir` takes what goes to the disk. `attention`
    is an implementation of `transformers`; its own choice when None.

    Raises:
        InputError: not found, no safetensors, a kind of model that `transformers` does not know, a model with split
            rows whose code is not trusted, a device map that cannot be used, or an attention whose package is missing.
    """
    from transformers import AutoModelForCausalLM

    place = resolve_device(device)
    source = locate_model(name_or_path)
    if not trust_remote_code:
        _require_whole_rows(name_or_path, source)
    options: dict[str, Any] = {}
    if device_map is not None:
        if device is not None:
            raise InputError(f"--device {device} and --device-map exclude each other: give one of them")
        places = _device_map(device_map)
        options = {"device_map": places, "offload_folder": offload_dir}
    elif offload_dir is not None:
        raise InputError(f"--offload-dir {offload_dir} takes what a device map puts on disk: give --device-map too")
    if attention is not None:
        _require_attention(attention)
        options["attn_implementation"] = attention
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=resolve_dtype(dtype, place),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model {name_or_path!r} cannot be loaded ({_first_line(error)}): "
            "name a model that transformers loads, with whole safetensors weights"
        ) from error
    if device_map is None:
        model = model.to(place)
    elif isinstance(places, dict):
        _require_known_modules(model, places, device_map)
    loaded: PreTrainedModel = model.eval()
    return loaded


def launched_dtype(dtype: DtypeName) -> DtypeName:
    """`auto` as `accelerate launch --mixed_precision` wants it; any other dtype as it is."""
    chosen: dict[str, DtypeName] = {"bf16": "bfloat16", "fp16": "float16"}
    return chosen.get(os.environ.get("ACCELERATE_MIXED_PRECISION", ""), dtype) if dtype == "auto" else dtype


def _device_map(text: str) -> str | dict[str, str | int]:
    if text in DEVICE_MAPS:
        return text
    path = Path(text)
    if path.suffix != ".json":
        raise InputError(f"device map {text!r} is unknown: choose {', '.join(DEVICE_MAPS)}, or a .json file")
    try:
        places = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"device map {text!r} cannot be read ({_first_line(error)}): give a JSON file") from error
    if not isinstance(places, dict) or not places or not all(type(place) in (str, int) for place in places.values()):
        raise InputError(f'device map {text!r} is not a JSON object such as {{"model.layers.0": "cpu", …}}')
    for place in places.values():
        if place != "disk":
            _require_place(text, place)
    return places


def _require_place(device_map: str, place: str | int) -> None:
    import torch

    try:
        torch.empty(1, device=torch.device(place)).cpu()  # a copy, because `meta` has nothing to copy
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device map {device_map!r} names {place!r}, which cannot be used here ({_first_line(error)}): "
            "give devices that are there, such as cpu, disk, 0 or cuda:0"
        ) from error


def _require_known_modules(model: PreTrainedModel, names: Iterable[str], device_map: str) -> None:
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in names:
        if name not in known:
            raise InputError(
                f"device map {device_map!r} names {name!r}, which the model does not have: its modules are named as in "
                f"{next(iter(decoder_layers(model)))}"
            )


def _require_attention(attention: str) -> None:
    from transformers.utils import is_flash_attn_2_available

    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError(
            "flash attention is not available here: install flash-attn on a machine with a CUDA GPU, "
            "or leave out --use-flash-attention"
        )


def merge_in_memory(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with a PEFT adapter merged into it; nothing is written.

    Raises:
        InputError: no adapter there, or one that does not fit.
    """
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"adapter folder {str(adapter)!r} has no adapter_config.json: name a PEFT adapter folder")
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"adapter {str(adapter)!r} cannot be loaded: {_first_line(error)}") from error
    return merged.eval()


def _require_whole_rows(name_or_path: str, source: str) -> None:
    """Refuse what `loki create-model` wrote: without its code, `transformers` would fill in random weights."""
    config_path = Path(source) / "config.json"
    config = read_json(config_path, what="model config") if config_path.is_file() else None
    if isinstance(config, dict) and "target_pos" in config:
        raise InputError(
            f"model {name_or_path!r} has its rows split for training: give --trust-remote-code to run the code in its "
            "folder, or make it an ordinary model with `loki restore-model` first"
        )


def load_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load a model's configuration only.

    Raises:
        InputError: not found, or of a kind that `transformers` does not know.
    """
    from transformers import AutoConfig

    source = locate_model(name_or_path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"config of {name_or_path!r} cannot be loaded: {_first_line(error)}") from error
    except Exception as error:  # each family checks its config in its own way
        text = " ".join(str(error).split())
        raise InputError(
            f"config of {name_or_path!r} cannot be used ({type(error).__name__}: {text}): mend it"
        ) from error
    return config


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its end token.

    Raises:
        InputError: not found, or no tokenizer in the folder.
    """
    from transformers import AutoTokenizer

    source = locate_model(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"tokenizer of {name_or_path!r} cannot be loaded ({_first_line(error)}): "
            "the model's folder must hold its tokenizer files"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
