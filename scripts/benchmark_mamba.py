"""Our selective scan against Transformers' two on a CPU, and a whole training step against `use_mambapy=True`.

    python scripts/benchmark_mamba.py scan    # forward + backward, peak memory, time over length
    python scripts/benchmark_mamba.py step    # random-weight Mamba-130M, LoRA r=8 on in_proj and out_proj
    python scripts/benchmark_mamba.py scan --assert   # also holds them to the bounds

Needs `mambapy` (in the extra `dev`). The variants take turns in one process; medians; memory is the growth of the peak
of a process of its own. Shapes: B rows, L steps, D channels, N states.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch

B, L, D, N = 2, 256, 1536, 16
THREADS = 2
BOUNDS = {
    "mambapy / ours": (6.0, None),
    "eager / ours": (12.0, None),
    "memory ours / mambapy": (None, 1 / 3),
    "time a token at 8,192 / at 1,024": (None, 1.3),
    "fp32 step use_mambapy / ours": (2.5, None),
    "bf16 step use_mambapy / ours": (2.5, None),
}


def inputs(length: int = L, rows: int = B) -> list[torch.Tensor]:
    """x, delta [B, D, L], A [D, N], B, C [B, N, L], as Transformers takes them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, D, length)] * 2 + [(D, N)] + [(rows, N, length)] * 2
    x, delta, A, B_, C = (torch.randn(shape, generator=generator) for shape in shapes)
    delta = torch.nn.functional.softplus(delta - 4)
    return [tensor.requires_grad_() for tensor in (x, delta, -A.exp(), B_, C)]


def variant(name: str, given: list[torch.Tensor]) -> Callable[[], None]:
    """A forward and backward pass of one implementation."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    from peftcli.models.selective_scan import selective_scan

    x, delta, A, B_, C = given

    def run() -> None:
        if name == "ours":
            y, _ = selective_scan(x.transpose(1, 2), delta.transpose(1, 2), A, B_.transpose(1, 2), C.transpose(1, 2))
        else:
            y = mamba_selective_scan(x, delta, A, B_, C, use_mambapy=name == "mambapy")
        y.sum().backward()

    return run


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak(name: str) -> int:
    """Bytes by which a pass raises the peak of this process, which should be new."""
    torch.set_num_threads(THREADS)
    run = variant(name, inputs())
    variant(name, inputs(length=8, rows=1))()  # what a first call loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmHWM")
    run()
    return resident("VmHWM") - before


def resident(which: str) -> int:
    """Bytes, from Linux's own count of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def scan(repeats: int) -> dict[str, float]:
    """Ratios of one pass."""
    passes = {name: variant(name, inputs()) for name in ("ours", "mambapy", "eager")}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, run in passes.items():
            if name != "eager" or turn < 3:
                times[name].append(seconds(run))
    at = {name: median(found[1:]) for name, found in times.items()}
    print(", ".join(f"{name} {1000 * found:.0f} ms" for name, found in at.items()))
    over = {}
    for length in (1024, 2048, 4096, 8192):
        run = variant("ours", inputs(length, rows=1))
        run()
        over[length] = median(seconds(run) for _ in range(3))
        print(f"length {length}: {1000 * over[length]:.0f} ms, {1e6 * over[length] / length:.0f} us a token")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        memory = {name: pool.submit(peak, name).result() for name in ("ours", "mambapy", "eager")}
    print(", ".join(f"{name} {found / 1e6:.0f} MB" for name, found in memory.items()))
    return {
        "mambapy / ours": at["mambapy"] / at["ours"],
        "eager / ours": at["eager"] / at["ours"],
        "memory ours / mambapy": memory["ours"] / memory["mambapy"],
        "time a token at 8,192 / at 1,024": over[8192] / over[1024] / 8,
    }


def step(repeats: int) -> dict[str, float]:
    """Ratios of whole optimiser steps, 1 row of 128 tokens, in float32 and in bfloat16 autocast over float32 weights.

    Matrix products, which are the same for both, take most of our step in float32.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners import tuners_utils
    from transformers import MambaConfig, MambaForCausalLM

    from peftcli.models import mamba_mixer

    # PEFT refuses out_proj, for fear of the fused CUDA kernel; on a CPU Transformers calls that module.
    tuners_utils._check_lora_target_modules_mamba = lambda *_: None
    ids = torch.randint(0, 50_000, (1, 128), generator=torch.Generator().manual_seed(0))

    def build(ours: bool) -> Callable[[bool], None]:
        torch.manual_seed(0)
        shape = MambaConfig(num_hidden_layers=24, use_cache=False, use_mambapy=not ours)
        base = MambaForCausalLM(shape)
        if ours:
            mamba_mixer.install(base)
        model = get_peft_model(base, LoraConfig(r=8, target_modules=["in_proj", "out_proj"])).train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

        def run(bf16: bool) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return run

    steps = {"ours": build(True), "use_mambapy": build(False)}
    ratios = {}
    for precision in ("fp32", "bf16"):
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats + 2):
            for name, run in steps.items():
                times[name].append(seconds(partial(run, precision == "bf16")))
        at = {name: median(found[2:]) for name, found in times.items()}
        print(precision, ", ".join(f"{name} {1000 * found:.0f} ms" for name, found in at.items()))
        ratios[f"{precision} step use_mambapy / ours"] = at["use_mambapy"] / at["ours"]
    return ratios


def main() -> None:
    """Measure, print, and with --assert hold to the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scan", "step"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--assert", dest="hold", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    found = {"scan": scan, "step": step}[asked.what](asked.repeats)
    missed = []
    for name, value in found.items():
        least, most = BOUNDS[name]
        bound = f"at least {least:g}" if least else f"at most {most:.3g}" if most else "none"
        print(f"{name}: {value:.3g} (bound: {bound})")
        if (least and value < least) or (most and value > most):
            missed.append(name)
    if asked.hold and missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
