"""What the installed PEFT's tuners accept, read from its source files: importing PEFT would import torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from peftcli.config.errors import Mistake, unknown

OURS = frozenset(
    ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version")
)
"""Fields that we fill in ourselves."""
NEEDED: dict[str, tuple[str, ...]] = {
    "ADAPTION_PROMPT": ("adapter_len", "adapter_layers"),
    "CARTRIDGE": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens",),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "P_TUNING": ("num_virtual_tokens",),
    "TRAINABLE_TOKENS": ("token_indices",),
}
"""Arguments that a tuner cannot do without, though PEFT gives them a default and trips over it later."""

_EITHER = {
    "ADALORA", "ADAPTION_PROMPT", "BEFT", "BOFT", "CARTRIDGE", "FOURIERFT", "HIRA", "IA3", "LILY", "LN_TUNING", "LORA",
    "MISS", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHIRA",
    "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
PACKED = {"nf4": _EITHER | {"C3A", "GRALORA"}, "int8": _EITHER | {"LOHA", "LOKR"}}
"""Tuners that train on a base in few bits, by its kind, with PEFT 0.21.2; others fail, or take the bits for numbers."""
PACKED_INITS = (None, True, False, "gaussian")
"""Values of `init_lora_weights` that do not look at the weight."""


@cache
def arguments() -> dict[str, frozenset[str]]:
    """The arguments of every tuner by its type (`LORA`, `LOKR`, ...); empty where PEFT is not installed."""
    spec = find_spec("peft")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent
    classes: dict[str, ast.ClassDef] = {}
    for file in [folder / "config.py", folder / "tuners" / "lycoris_utils.py", *folder.glob("tuners/*/config.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {}
    for node in classes.values():
        if tuner := _peft_type(node):
            found[tuner] = frozenset(_fields(node, classes)) - OURS
    return found


def mistakes(tuner: str, given: dict[str, object], type_where: str, where: dict[str, str]) -> Iterator[Mistake]:
    """What PEFT would not accept.

    Args:
        tuner: `method.type`.
        given: `method.args`.
        type_where: Where the type was written.
        where: Where each argument was written.
    """
    known = arguments()
    if not known:
        return
    if tuner.upper() not in known:
        yield unknown("method.type", tuner, known, type_where)
        return
    for name in given:
        if name in OURS:
            yield Mistake(f"method.args.{name} is filled in by this program", where[name], hint="leave it out")
        elif name not in known[tuner.upper()]:
            yield unknown(f"argument of {tuner.upper()}", name, known[tuner.upper()], where[name])
    yield from lacking(tuner.upper(), given, type_where)


def lacking(tuner: str, given: dict[str, object], where: str = "") -> list[Mistake]:
    """An argument each that the tuner needs and was not given."""
    return [
        Mistake(f"PEFT's {tuner} needs method.args.{name}", where, hint=f"method.args.{name}=VALUE")
        for name in NEEDED.get(tuner, ())
        if given.get(name) is None
    ]


def on_packed(tuner: str, given: dict[str, object], kind: str) -> Iterator[tuple[str, str]]:
    """What does not go with a base in few bits: the key it was written under, and why.

    Args:
        tuner: `method.type`.
        given: `method.args`.
        kind: `model.quantization`.
    """
    if tuner.upper() in arguments() and tuner.upper() not in PACKED[kind]:
        yield "method.type", f"PEFT's {tuner.upper()} does not train on matrices in {kind}"
    if given.get("init_lora_weights") not in PACKED_INITS:
        init = given["init_lora_weights"]
        yield "method.args.init_lora_weights", f"init_lora_weights={init} needs the weights' own numbers, not {kind}"
    if kind == "int8" and given.get("use_dora"):
        yield "method.args.use_dora", "PEFT's DoRA does not train on matrices in int8"


def _peft_type(node: ast.ClassDef) -> str:
    """`LORA` of a class whose `__post_init__` says `self.peft_type = PeftType.LORA`."""
    for inner in ast.walk(node):
        match inner:
            case ast.Assign(
                targets=[ast.Attribute(attr="peft_type")], value=ast.Attribute(value=ast.Name(id="PeftType"), attr=name)
            ):
                return name
    return ""


def _fields(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(classes[base.id], classes)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
