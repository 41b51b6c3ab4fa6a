"""Where Hydra looks: the recipe itself, the user's `configs/` beside it, the shipped groups, and installed methods."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from peftcli.config import catalog, yaml_files
from peftcli.config.errors import UserError
from peftcli.config.yaml_files import YamlFile

RECIPE = "_recipe_"
"""The recipe's name inside Hydra, whatever its file is called."""


@dataclass
class _FileResult(ConfigResult):
    """What Hydra wants to know of a file, and the file with its lines."""

    file: YamlFile = field(default_factory=lambda: YamlFile(Path()))


class _Folder(FileConfigSource):
    """A folder of groups, each file read with its lines."""

    def load_config(self, config_path: str) -> ConfigResult:
        file = yaml_files.read(Path(self.path) / self._normalize_file_name(config_path))
        return _result(file, file.content)


class _Recipe(_Folder):
    """The recipe's file alone; its folder is not searched."""

    def __init__(self, path: Path, without: frozenset[str]):
        super().__init__("recipe", str(path))
        self.without = without

    def load_config(self, config_path: str) -> ConfigResult:
        file = yaml_files.read(Path(self.path))
        return _result(file, {key: value for key, value in file.content.items() if key not in self.without})

    def is_group(self, config_path: str) -> bool:
        return config_path == ""

    def is_config(self, config_path: str) -> bool:
        return config_path == RECIPE

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class _Methods(_Recipe):
    """Methods of outside packages, which bring settings but no group file."""

    def __init__(self) -> None:
        super().__init__(Path("installed methods"), frozenset())

    def load_config(self, config_path: str) -> ConfigResult:
        name = config_path.removesuffix(".yaml").partition("/")[2]
        return _result(YamlFile(Path(catalog.methods()[name])), {"name": name})

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "method")

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        return group == "method" and name in catalog.methods()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return sorted(catalog.methods()) if config_path == "method" else []


class _Stubs(_Methods):
    """Stands in for choices that do not exist, so that the search for further mistakes can go on."""

    def __init__(self, names: set[str]):
        super().__init__()
        self.names = names

    def load_config(self, config_path: str) -> ConfigResult:
        return _result(YamlFile(Path(config_path)), {})

    def is_group(self, config_path: str) -> bool:
        return config_path == ""

    def is_config(self, config_path: str) -> bool:
        return config_path.removesuffix(".yaml") in self.names

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class Repository(ConfigRepository):
    """All of the above as one Hydra repository that remembers the files it read.

    Args:
        recipe: The recipe's file.
        folders: Folders of groups, the first found wins.
        without: Top-level keys of the recipe to leave out.

    Attributes:
        files: Every file read so far by its name inside Hydra.
        stubs: Choices that do not exist, to be treated as empty files.
    """

    def __init__(self, recipe: Path, folders: list[Path], without: frozenset[str] = frozenset()):
        self.files: dict[str, YamlFile] = {}
        self.stubs: set[str] = set()
        self._results: dict[str, _FileResult] = {}
        self.sources: list[Any] = [_Recipe(recipe, without)]
        self.sources += [_Folder("configs", str(folder)) for folder in folders]
        self.sources += [_Methods(), _Stubs(self.stubs)]

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Read a file once; Hydra asks for it several times."""
        name = config_path.removesuffix(".yaml")
        if name not in self._results:
            found = super().load_config(config_path)
            if not isinstance(found, _FileResult):
                return None
            self._results[name] = found
            self.files[name] = found.file
        return deepcopy(self._results[name])  # Hydra edits the defaults list that it gets

    def choices(self, group: str) -> list[str]:
        """The choices of a group; empty where there is no such group."""
        return self.get_group_options(group) if self.group_exists(group) else []


def _result(file: YamlFile, content: dict[str, Any]) -> _FileResult:
    try:
        header = ConfigSource._get_header_dict(file.text[:512])
    except ValueError as error:
        raise UserError(f"{yaml_files.shown(file.path)}:1: {error}") from error
    return _FileResult("peftcli", str(file.path), OmegaConf.create(content), header, file=file)
