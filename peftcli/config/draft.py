"""A composition under way: the recipe, its groups and the overrides merged, each value with its origin.

Hydra's own defaults lists and override grammar decide what is composed. Each file and each override is then applied
here, one after the other, because Hydra stops at the first mistake and forgets where a value came from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftcli.config import catalog, overrides
from peftcli.config.errors import Mistake, unknown
from peftcli.config.paths import shipped, site
from peftcli.config.sources import RECIPE, Repository
from peftcli.config.validate import UNREADABLE, chosen_settings, schema_defaults
from peftcli.config.yaml_files import YamlFile, shown

UNIONS = frozenset({"method", "task", "launch"})
"""Groups whose keys depend on the choice."""
REPLACED = UNIONS | {"data", "model"}
"""Groups of which another choice on the command line leaves the recipe's own values out: they belong to its own."""


class Draft:
    """The merged values, where each came from, and the mistakes so far.

    Args:
        path: The recipe's file.
        lines: The overrides as typed.
    """

    def __init__(self, path: Path, lines: list[str]):
        self.path, self.lines = path, lines
        self.mistakes: list[Mistake] = []
        self.notes: list[str] = []
        self.origins: dict[str, str] = {}
        self.config: Any = OmegaConf.create()
        places = (path.parent / "configs", site(), shipped("configs"))
        self.folders = [folder for folder in places if folder and folder.is_dir()]
        self.repository = Repository(path, self.folders)
        self.groups = catalog.groups(path.parent / "configs")
        self.overrides = overrides.Overrides()
        self.undecided: set[str] = set()

    @property
    def is_readable(self) -> bool:
        """Whether every file was YAML."""
        return all(file.is_readable for file in self.repository.files.values())

    def origin(self, key: str) -> str:
        """Where a key, or the closest key above it, was written."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, f"{shown(self.path)}:1")

    def collect(self) -> None:
        """Merge the recipe's files in the order of Hydra's defaults list, with the group choices of the overrides."""
        own = self._defaults([])
        listed = own.overrides.known_choices if own else {}
        self.overrides = overrides.sort(self.lines, self.repository, set(listed))
        self.mistakes += self.overrides.mistakes
        self.undecided |= self.overrides.undecided
        replaced = frozenset[str]()
        if self.overrides.choices:
            replaced = self._leave_out_replaced(listed)
            own = self._defaults(self.overrides.choices) or own
        for default in own.defaults if own else ():
            if default.config_path is not None:
                self._merge(default)
        own_keys = self._recipe.content.keys() - replaced
        for choice in self.overrides.choices:  # what such a group lacks is the choice's to answer for
            if choice.key_or_group in self.origins and choice.key_or_group not in own_keys:
                self.origins[choice.key_or_group] = overrides.where(choice)
        for file in self.repository.files.values():
            self.mistakes += file.mistakes

    @property
    def _recipe(self) -> YamlFile:
        return self.repository.files.get(RECIPE, YamlFile(self.path))

    def _leave_out_replaced(self, listed: dict[str, str | None]) -> frozenset[str]:
        recipe = self._recipe
        replaced = {
            choice.key_or_group: choice
            for choice in self.overrides.choices
            if choice.key_or_group in REPLACED & recipe.content.keys()
            and isinstance(recipe.content[choice.key_or_group], dict)
            and listed.get(choice.key_or_group) != choice.value()
        }
        for group, choice in replaced.items():
            keys = ", ".join(f"{group}.{key}" for key in recipe.content[group])
            self.notes.append(f"{choice.input_line}: the recipe's own {keys} ({recipe.where(group)}) left out")
        if replaced:
            self.repository = Repository(self.path, self.folders, frozenset(replaced))
        return frozenset(replaced)

    def _defaults(self, choices: list[Override]) -> DefaultsList | None:
        """Hydra's defaults list; what it objects to is noted and taken away until it succeeds."""
        choices = list(choices)
        while True:
            try:
                return create_defaults_list(self.repository, RECIPE, choices, prepend_hydra=False, skip_missing=True)
            except MissingConfigException as error:
                self._note_missing(error)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                culprit = next((c for c in choices if f"'{c.key_or_group}" in str(error)), None)
                place = overrides.where(culprit) if culprit else f"{shown(self.path)}:1"
                self.mistakes.append(Mistake(" ".join(str(error).split()), place))
                if culprit is None:
                    return None
                choices.remove(culprit)

    def _note_missing(self, error: MissingConfigException) -> None:
        """A defaults list names a file that is not there: note it, and go on as if it were empty."""
        name = str(error.missing_cfg_file)
        self.repository.stubs.add(name)
        group, _, choice = name.rpartition("/")
        place = f"{shown(self.path)}:1"
        for file in self.repository.files.values():
            for listed_group, listed_choice, line in file.choices:
                if listed_choice.removesuffix(".yaml") == choice and listed_group in (group, ""):
                    place = f"{shown(file.path)}:{line}"
        if group in self.groups:
            self.undecided.add(group)
            self.mistakes.append(unknown(group, choice, tuple(error.options or ()), place))
            return
        hint = "an entry of the defaults list is `- GROUP: CHOICE`"
        mistake = replace(unknown("group", group or choice, self.groups, place), hint=hint)
        self.undecided.add(mistake.nearest)
        self.mistakes.append(mistake)

    def _merge(self, default: ResultDefault) -> None:
        name = str(default.config_path).removesuffix(".yaml")
        result = self.repository.load_config(name)
        if result is None or name in self.repository.stubs:
            return
        package = default.package if default.package is not None else result.header.get("package") or ""
        content: Any = result.config
        if package:
            content = OmegaConf.create()
            OmegaConf.update(content, package, result.config, merge=False)
        self.config = OmegaConf.merge(self.config, content)
        self._note_origins(self.repository.files[name], result.config, package)

    def _note_origins(self, file: YamlFile, content: Any, package: str) -> None:
        if package:
            self.origins.setdefault(package, file.where(""))
        for key, is_leaf in _keys(content):
            full = f"{package}.{key}" if package else key
            if is_leaf:
                self._forget(full)
            self.origins[full] = file.where(key)

    def _forget(self, key: str) -> None:
        for known in [known for known in self.origins if known == key or known.startswith(f"{key}.")]:
            del self.origins[known]

    def apply_values(self) -> None:
        """Apply the value overrides, one after the other; one that does not fit is noted and the next is tried."""
        for override in self.overrides.values:
            place = overrides.where(override)
            # The schema says which keys there are, so a key that no file mentions needs no plus sign.
            forced = override if override.is_delete() else replace(override, type=OverrideType.FORCE_ADD)
            key = override.key_or_group
            if problem := self._cannot_apply(override):
                self.mistakes.append(problem)
                continue
            try:
                ConfigLoaderImpl._apply_overrides_to_config([forced], self.config)
            except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
                reason = error.__cause__ or error
                self.mistakes.append(Mistake(" ".join(str(reason).split()), place))
                continue
            if override.is_delete():
                self._forget(key)
                continue
            value = override.value()
            if isinstance(value, dict):
                for below, _ in _keys(value):
                    self.origins[f"{key}.{below}"] = place
            else:
                self._forget(key)
            self.origins[key] = place
            while "." in key:
                key = key.rpartition(".")[0]
                if {self.origins[known] for known in self.origins if known.startswith(f"{key}.")} == {place}:
                    self.origins[key] = place  # nothing was below it before

    def _cannot_apply(self, override: Override) -> Mistake | None:
        """What a prefix asks for and the recipe does not allow, in our words rather than Hydra's."""
        key, place = override.key_or_group, overrides.where(override)
        if override.package is not None:
            return unknown("group", key, self.groups, place)
        there = key in self.origins
        if override.is_delete() and not there:
            return replace(unknown("key to take away", key, self.origins, place), allowed=())
        if override.type is OverrideType.ADD and there and not isinstance(override.value(), dict | list):
            return Mistake(f"{key} already has a value", place, hint=f"write {key}=... without the plus sign")
        return None

    def resolve(self) -> dict[str, Any]:
        """The merged values as plain dicts and lists; what cannot be resolved is noted and marked unreadable."""
        chosen = chosen_settings(OmegaConf.to_container(self.config, resolve=False))  # type: ignore[arg-type]
        # Defaults of the schema are there for `${...}` to refer to, but not as values that someone wrote.
        filled = OmegaConf.merge(schema_defaults(chosen), self.config)
        tree = self._resolved(filled, self.config, "")
        return tree | dict.fromkeys(UNIONS & self.undecided, UNREADABLE)

    def _resolved(self, node: Any, own: Any, path: str) -> Any:
        if isinstance(node, DictConfig):
            keys = own.keys() if isinstance(own, DictConfig) and not _is_reference(own) else node.keys()
            return {key: self._item(node, own, key, f"{path}.{key}".lstrip(".")) for key in map(str, keys)}
        return [self._item(node, own, position, f"{path}.{position}") for position in range(len(node))]

    def _item(self, node: DictConfig | ListConfig, own: Any, key: Any, path: str) -> Any:
        try:
            if OmegaConf.is_missing(own if isinstance(own, DictConfig) else node, key):
                self.mistakes.append(Mistake(f"{path} is ???: it has no value yet", self.origin(path)))
                return UNREADABLE
            value = node[key]
            below = own._get_node(key) if isinstance(own, DictConfig) and not _is_reference(own) else None
            return self._resolved(value, below, path) if isinstance(value, DictConfig | ListConfig) else value
        except (OmegaConfBaseException, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else "it refers to itself"
            self.mistakes.append(Mistake(f"{path} cannot be resolved: {reason}", self.origin(path)))
            return UNREADABLE


def _keys(content: Any, path: str = "") -> list[tuple[str, bool]]:
    """Every dotted key of nested dicts, and whether it is a leaf; nothing is resolved."""
    found = []
    items = content.items_ex(resolve=False) if isinstance(content, DictConfig) else content.items()
    for name, value in items:
        key = str(name)
        full = f"{path}.{key}" if path else key
        nested = isinstance(value, dict) or (isinstance(value, DictConfig) and not _is_reference(value))
        found.append((full, not nested))
        if nested:
            found += _keys(value, full)
    return found


def _is_reference(value: DictConfig) -> bool:
    return value._is_none() or value._is_missing() or value._is_interpolation()
