"""Loading a causal language model and its tokenizer: one place for device, dtype and safety."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from safetensors import SafetensorError

from loki.choices import DtypeName
from loki.embedded import EMBEDDED_LABEL, EMBEDDED_NAME, embedded_model_directory
from loki.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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
        torch.empty(0, device=device)
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
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, from safetensors only.

    Raises:
        InputError: not found, no safetensors, or a kind of model that `transformers` does not know.
    """
    from transformers import AutoModelForCausalLM

    place = resolve_device(device)
    source = locate_model(name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=resolve_dtype(dtype, place),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model {name_or_path!r} cannot be loaded ({_first_line(error)}): "
            "name a model that transformers loads, with whole safetensors weights"
        ) from error
    loaded: PreTrainedModel = model.to(place).eval()
    return loaded


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
