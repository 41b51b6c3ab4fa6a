"""Where a checkpoint is, and what goes wrong on the way to it, in plain words."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from peftcli.config import paths
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import ModelConfig

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OFFLINE = (
    "without a network: model.source=bundled with model.name=mamba-wordnet, model.source=sample with a fetched sample "
    "(peft samples list), model.source=folder with a folder on this machine, a model that is already in the Hugging "
    "Face cache ($HF_HOME), or for counting alone its configuration in model.shape"
)


def find_folder(config: ModelConfig) -> Path | None:
    """The local folder of the checkpoint; None for the hub."""
    if config.source == "sample":
        return paths.sample_folder(config.name)
    if config.source == "bundled":
        return paths.bundled(config.name)
    if config.source == "hub":
        if Path(config.name).is_dir():
            raise UserError(
                Mistake(f"model.name={config.name!r} is a folder here", hint="say so with model.source=folder")
            )
        return None
    folder = Path(config.name).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(Mistake(f"model folder {config.name!r} does not exist", hint=f"looked for {folder}"))
    if not (folder / "config.json").is_file():
        raise UserError(Mistake(f"{folder} is not a checkpoint: it has no config.json"))
    return folder


def check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors.

    Raises:
        UserError: It has no weights at all.
        CheckFailed: `unsafe-weights`: it has pickled ones.
    """
    if not any(folder.glob("*.safetensors")):
        if pickled := [file.name for pattern in PICKLES for file in folder.glob(pattern)]:
            raise _unsafe(f"{folder} has pickled weights only ({', '.join(sorted(pickled))})")
        raise UserError(Mistake(f"{folder} has no weights: no *.safetensors in it"))


def where(config: ModelConfig, folder: Path | None) -> dict[str, Any]:
    """Keyword arguments of every `from_pretrained`: which revision, whether to ask the hub, never to run its code."""
    place: dict[str, Any] = {"local_files_only": True} if folder else {"revision": config.revision or "main"}
    if not folder and not hub_answers():
        place["local_files_only"] = True
    return {"trust_remote_code": False, **place}


@cache
def hub_answers() -> bool:
    """Whether the hub's name resolves: without a network the hub's clients would try each file for 20 seconds."""
    from huggingface_hub import constants

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def plain_errors(config: ModelConfig) -> Iterator[None]:
    """Turn what Transformers raises into the user's mistake or the named check that it is."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # Transformers would otherwise ask a hub service to convert a pickle-only repository, and download the result.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        yield
    except SafetensorError as error:
        raise UserError(Mistake(f"the weights of {config.name} cannot be read: {error}")) from error
    except StrictDataclassError as error:
        raise UserError(Mistake(f"the configuration of {config.name} is not valid: {error}")) from error
    except (OSError, ValueError, ImportError) as error:
        text = str(error)
        if "trust_remote_code" in text or ("execute" in text and "code" in text):
            raise _unsafe(f"{config.name} needs code of its own to load") from error
        if "safetensors" in text and "not appear" in text:
            raise _unsafe(f"{config.name} has pickled weights only") from error
        first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        hint = OFFLINE if config.source == "hub" and isinstance(error, OSError) else ""
        what = f"cannot load {config.name!r} (model.source={config.source}): {first}"
        raise UserError(Mistake(what, hint=hint)) from error


def _unsafe(what: str) -> CheckFailed:
    return CheckFailed("unsafe-weights", what, "convert it to safetensors in a trusted place and use that folder")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no load report: what the report would say is checked right after."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # a head of no classes
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
