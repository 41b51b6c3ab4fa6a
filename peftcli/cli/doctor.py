"""`peft doctor`: what of this machine training can use, and what to do where something is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftcli.config import paths

GB = 10**9
LITTLE_DISK, LITTLE_MEMORY = 2 * GB, 2 * GB
EXTRAS = {
    "samples": ("onnx",), "tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow",),
    "registry": ("trackio",), "quantized": ("bitsandbytes",),
}  # fmt: skip
"""Extras and the modules they bring."""
HUB_SECONDS = 5.0
WIDTH = 120
"""Columns of the output where it goes to a file or a pipe."""


@dataclass(frozen=True)
class Finding:
    """One row: a `problem` makes training impossible, a `note` is worth knowing."""

    about: str
    state: Literal["ok", "note", "problem"]
    what: str
    do: str = ""


def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask the model hub whether it answers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at this machine and say what will work."""
    looks: list[Callable[[], list[Finding]]] = [
        _python, _packages, _extras, _cpu, _gpus, _quantization, _memory, _places, _samples,
    ]  # fmt: skip
    found = [finding for look in looks for finding in look()]
    found += _hub() if network else [Finding("network", "ok", "not asked", "peft doctor --network asks the model hub")]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        _print(found)
    if any(finding.state == "problem" for finding in found):
        raise typer.Exit(1)


def _print(found: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "", "note": "yellow", "problem": "bold red"}
    table = Table.grid(padding=(0, 2))
    for finding in found:
        text = finding.what + (f"\n{finding.do}" if finding.do else "")
        table.add_row(finding.state, finding.about, text, style=colours[finding.state])
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)


def _python() -> list[Finding]:
    wanted = metadata.metadata("peftcli")["Requires-Python"]
    from packaging.specifiers import SpecifierSet

    fits = platform.python_version() in SpecifierSet(wanted)
    what = f"{platform.python_version()} at {sys.executable}"
    return [Finding("python", "ok" if fits else "problem", what, "" if fits else f"needs Python {wanted}")]


def _packages() -> list[Finding]:
    """Every requirement of the base install against what is here."""
    from packaging.requirements import Requirement

    found = []
    for line in metadata.requires("peftcli") or []:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            here = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found.append(Finding(wanted.name, "problem", "is not installed", f'pip install "{wanted}"'))
            continue
        fits = wanted.specifier.contains(here, prereleases=True)
        do = "" if fits else f'pip install "{wanted}"'
        what = here if fits else f"{here} is outside {wanted.specifier}"
        found.append(Finding(wanted.name, "ok" if fits else "problem", what, do))
    return found


def _extras() -> list[Finding]:
    missing = [name for name, modules in EXTRAS.items() if not all(find_spec(module) for module in modules)]
    here = [name for name in EXTRAS if name not in missing]
    do = f"pip install 'peftcli[{','.join(missing)}]' where they are wanted" if missing else ""
    what = f"here: {', '.join(here) or 'none'}; not here: {', '.join(missing) or 'none'}"
    return [Finding("extras", "note" if missing else "ok", what, do)]


def _cpu() -> list[Finding]:
    if not find_spec("torch"):
        return []
    import torch

    from peftcli.artifacts.environment import cores
    from peftcli.models.precision import choose

    chosen, name = choose("auto", "cpu"), torch.backends.cpu.get_cpu_capability()
    seen, usable = os.cpu_count() or 1, cores()
    why = "it has bf16 instructions" if chosen == "bf16" else "it has no bf16 instructions, so bf16 would be slower"
    found = [Finding("cpu", "ok", f"{platform.machine()}, {name}; training.precision=auto takes {chosen}: {why}")]
    what = f"{usable} of {seen} may be used, and one process uses all of them"
    do = "the others are withheld by the scheduler or by taskset" if usable < seen else ""
    found.append(Finding("cores", "note" if usable < seen else "ok", what, do))
    if (set_to := os.environ.get("OMP_NUM_THREADS")) and set_to != str(usable):
        what = f"OMP_NUM_THREADS={set_to} is set; peft train uses {usable} threads all the same"
        found.append(Finding("threads", "note", what, "launch.threads=N sets their number"))
    return found


def _gpus() -> list[Finding]:
    if not find_spec("torch"):
        return []
    import torch

    from peftcli.models.precision import choose
    from peftcli.reports.units import size

    if torch.backends.mps.is_available():
        return [Finding("gpu", "ok", "Apple GPU (mps)")]
    if not torch.cuda.is_available():
        cpu_build = torch.version.cuda is None and torch.version.hip is None
        why = "this PyTorch is built for CPUs" if cpu_build else "PyTorch sees none: driver, or CUDA_VISIBLE_DEVICES"
        return [Finding("gpu", "note", f"none; {why}", "small models train on the CPU")]
    found = []
    for number in range(torch.cuda.device_count()):
        gpu, (free, total) = torch.cuda.get_device_properties(number), torch.cuda.mem_get_info(number)
        what = f"{gpu.name}, {size(free)} of {size(total)} free; auto takes {choose('auto', f'cuda:{number}')}"
        found.append(Finding(f"gpu {number}", "ok", what))
    return found


def _quantization() -> list[Finding]:
    """Whether bases can be held in few bits on the hardware that training would take."""
    if not find_spec("torch") or not find_spec("bitsandbytes"):
        return [Finding("quantization", "note", "bitsandbytes is not here", "pip install 'peftcli[quantized]'")]
    import torch

    from peftcli.config.errors import UserError
    from peftcli.models import quantized

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for kind in quantized.ARGUMENTS:
        try:
            quantized.check(kind, device)
        except UserError as error:
            found.append(Finding("quantization", "note", error.mistakes[0].what, error.mistakes[0].hint))
    done = f"model.quantization=nf4 and int8 run on {device}, by bitsandbytes {metadata.version('bitsandbytes')}"
    return found or [Finding("quantization", "ok", done)]


def _memory() -> list[Finding]:
    if not find_spec("psutil"):
        return []
    import psutil

    from peftcli.reports.units import size

    memory = psutil.virtual_memory()
    little = memory.available < LITTLE_MEMORY
    do = "close other programs; peft estimate RECIPE says what a recipe needs" if little else ""
    what = f"{size(memory.available)} of {size(memory.total)} free"
    return [Finding("memory", "note" if little else "ok", what, do)]


def _places() -> list[Finding]:
    """The cache and the present folder: space, and permission to write."""
    from peftcli.reports.units import size

    here = (("cache", paths.cache(), "set PEFTCLI_CACHE to another folder"), ("runs", Path("runs"), "output=FOLDER"))
    found = []
    for about, folder, do in here:
        parent = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.exists())
        free = shutil.disk_usage(parent).free
        what = f"{folder}: {size(free)} free"
        if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
            found.append(Finding(about, "problem", f"{folder} cannot be written to", do))
        elif free < LITTLE_DISK:
            found.append(Finding(about, "note", what, f"little for checkpoints and samples; {do}"))
        else:
            found.append(Finding(about, "ok", what))
    return found


def _samples() -> list[Finding]:
    if not find_spec("pyarrow"):
        return []
    from peftcli.data.samples import catalog, store

    here = [sample.name for sample in catalog.SAMPLES if store.present(sample.name)]
    if here:
        return [Finding("samples", "ok", ", ".join(here))]
    return [Finding("samples", "note", "none is fetched", "peft samples list; peft samples fetch NAME")]


def _hub() -> list[Finding]:
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except HTTPError:
        pass  # an answer all the same
    except (URLError, OSError, ValueError) as error:
        what = f"{endpoint} does not answer: {getattr(error, 'reason', error)}"
        return [Finding("network", "note", what, "model.source=bundled, sample and folder work without it")]
    return [Finding("network", "ok", f"{endpoint} answers")]
