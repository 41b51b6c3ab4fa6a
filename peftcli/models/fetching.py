"""The weights of a hub checkpoint into the hub's own cache, before any process waits for another."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from peftcli.config.schema import ModelConfig
from peftcli.models.checkpoint import hub_answers, plain_errors


def fetch(config: ModelConfig) -> None:
    """Download what is not in the cache yet, with the hub's own progress bars.

    Launchers of several nodes may do so at once: the hub's client locks each file, and the second waits for the first.

    Raises:
        UserError: The hub knows no such model, or does not answer in the midst of it.
    """
    if config.source != "hub" or config.weights != "pretrained" or not hub_answers():
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with plain_errors(config), suppress(EntryNotFoundError):  # no such files: loading says what is wrong with that
        try:
            index = hf_hub_download(config.name, "model.safetensors.index.json", revision=config.revision)
            files = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        except EntryNotFoundError:
            files = ["model.safetensors"]
        for file in files:
            hf_hub_download(config.name, file, revision=config.revision)
