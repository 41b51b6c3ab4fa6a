"""The run folder's config.yaml: the resolved run, written once, and all that a worker process reads."""

from __future__ import annotations

import glob
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_omega_conf_dumper

from peftcli.config import yaml_files
from peftcli.config.errors import UserError
from peftcli.config.rules import conflicts
from peftcli.config.schema import RunConfig
from peftcli.config.validate import validate


def plain(config: RunConfig) -> dict[str, Any]:
    """The run as nested dicts, lists and scalars, the schema version first."""
    tree = _plain(asdict(config))
    return {"schema_version": tree.pop("schema_version"), **tree}


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved run as YAML."""
    path.write_text(dump(plain(config)), encoding="utf-8")


def anchored(config: RunConfig) -> RunConfig:
    """The same run with local files and model folders as absolute paths, so that it can be used from any folder."""
    model, files = config.model, {split: _anchored(value) for split, value in config.data.files.items()}
    if model.source == "folder":
        model = replace(model, name=str(Path(os.path.expanduser(model.name)).absolute()))
    method = config.method
    if tuned := getattr(method, "tuned", None):
        method = replace(method, tuned=str(Path(os.path.expanduser(tuned)).absolute()))
    task: Any = config.task
    if databases := getattr(task, "databases", None):
        task = replace(task, databases=str(Path(os.path.expanduser(databases)).absolute()))
    domains = {
        name: replace(domain, files={split: _anchored(value) for split, value in domain.files.items()})
        for name, domain in config.data.domains.items()
    }
    data = replace(config.data, files=files, domains=domains)
    return replace(config, model=model, method=method, task=task, data=data)


def _anchored(value: Any) -> Any:
    """A path, a glob or a list of them; what is none of these is left for the reader of the data to refuse."""
    if isinstance(value, list | tuple):
        return [_anchored(item) for item in value]
    if not isinstance(value, str):
        return value
    path = Path(os.path.expanduser(value))
    if path.is_file() or not glob.has_magic(value):
        return str(path.absolute())
    return str(Path(glob.escape(str(Path.cwd()))) / path)  # only what the user wrote is a pattern


def dump(tree: dict[str, Any]) -> str:
    """Nested dicts as YAML that our reader reads back as they are: the text "1e3" gets quotes, for example."""
    return yaml.dump(tree, Dumper=get_omega_conf_dumper(), sort_keys=False, allow_unicode=True, width=120)


def load(path: Path) -> RunConfig:
    """Read a saved run; it is checked as strictly as a recipe.

    Raises:
        UserError: The file cannot be read, or does not hold a valid run.
    """
    file = yaml_files.read(Path(path), references=False)
    if file.mistakes:
        raise UserError(*file.mistakes)
    checked = validate(file.content, file.where)
    if mistakes := checked.mistakes + conflicts(checked):
        raise UserError(*dict.fromkeys(mistakes))
    return checked.config


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
