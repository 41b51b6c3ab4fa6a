"""Sparse adapters against PEFT's LoRA at the same layers: time and memory of a step; and latency against the base.

    python scripts/benchmark_sparse.py step       # a whole run of each in turn, step by step, in one process
    python scripts/benchmark_sparse.py memory     # peak memory of the stage that holds most, in a process each
    python scripts/benchmark_sparse.py latency    # base, dense and compacted modules in turn, batches of 1 and 32
    python scripts/benchmark_sparse.py step memory latency --assert   # also holds them to the bounds

Cases: ViT-S/14 (after attention and MLP of each block) and a thin ResNet-50 (after each block; LoRA on its last
convolution), pictures of 112 pixels, 32 units a module, LoRA of the rank that trains as many parameters. Needs the
samples vit-s14 and resnet50-thin. Steps are seconds of one CPU thread at work, so that other programs on the machine
count little; latencies are seconds, as the report of a run has them. Medians; a ratio below 1 means that ours is faster
or smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from statistics import median
from typing import Any

from resident import largest

MODELS = ("vit-s14", "resnet50-thin")
PIXELS, UNITS, BATCH = 112, 32, 32
SPARSITY = 0.8
STEPS = 40
"""Of a run; the stage that prunes has half of them, and prunes at each: the worst case, since longer runs prune once in
1 % of their steps."""
PLACES: dict[str, dict[str, dict[str, Any]]] = {
    "vit-s14": {
        "all blocks": {},
        "last 4 blocks": {"last_blocks": 4},
        "MLPs of the last 4 blocks": {"last_blocks": 4, "targets": ["mlp"]},
    },
    "resnet50-thin": {"all blocks": {}, "last 3 blocks": {"last_blocks": 3}, "last block": {"last_blocks": 1}},
}
BOUNDS = {"step": 1.0, "memory": 1.0, "latency": 1.02}


def base(model: str) -> tuple[Any, str]:
    """The frozen base with a new head, and the precision that a run would take here."""
    import torch

    from peftcli.config.schema import ModelConfig
    from peftcli.models import loading, precision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = precision.choose("auto", "cpu")
    found = loading.load(
        ModelConfig(model, source="sample"), chosen, "image-classification", ["bad", "good"], image_size=PIXELS
    )
    return found, chosen


def pictures(count: int) -> Any:
    """Noise in the layout in which the image reader gives its pictures: channels last."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    return torch.randn(count, PIXELS, PIXELS, 3, generator=drawn).permute(0, 3, 1, 2)


def sparse(model: str, **settings: Any) -> tuple[Any, Any, str]:
    """The base with our modules, the method, the precision."""
    from peftcli.methods.sparse_adapter.settings import Settings
    from peftcli.methods.sparse_adapter.tuner import Method

    loaded, chosen = base(model)
    method = Method(Settings(r=UNITS, sparsity=SPARSITY, guard=None, **settings))
    return method.attach(loaded.model, loaded.family), method, chosen


def lora(model: str, like: int) -> tuple[Any, Any]:
    """The base with LoRA at the same layers, of the rank whose parameters come nearest to `like`, and its optimiser."""
    import torch
    from peft import LoraConfig

    from peftcli.methods.injection import inject

    loaded, _ = base(model)
    ends = "o_proj|fc2" if model.startswith("vit") else r"layers\.\d+\.layer\.2\.convolution"
    names = [n for n, m in loaded.model.named_modules() if hasattr(m, "weight") and _ends(n, ends)]
    each = sum(w.shape[0] + w.shape[1] for w in (loaded.model.get_submodule(n).weight for n in names))
    rank = round(like / each)
    wrapped = inject(loaded.model, LoraConfig(r=rank, lora_alpha=rank), names)
    print(f"{model}: LoRA of rank {rank} with {trained(wrapped):,} trained parameters", flush=True)
    return wrapped, torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=5e-4, fused=True)


def _ends(name: str, pattern: str) -> bool:
    import re

    return re.search(rf"(?:{pattern})$", name) is not None


def trained(model: Any) -> int:
    """Trained parameters, the head among them."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def advance(model: Any, optimiser: Any, pixels: Any, chosen: str) -> float:
    """One step; its seconds of CPU time."""
    import torch

    from peftcli.models import precision
    from peftcli.training.casting import left_to_autocast

    began = time.process_time()
    with left_to_autocast(model, chosen != "fp32"), precision.autocast(chosen, "cpu"):
        logits = model(pixel_values=pixels).logits.float()
    torch.nn.functional.cross_entropy(logits, torch.arange(len(pixels)) % 2).backward()
    optimiser.step()
    optimiser.zero_grad()
    return time.process_time() - began


def stages(method: Any, model: Any, steps: int) -> Iterator[tuple[str, int, Any]]:
    """Each stage of a run with its steps and its optimiser, as the loop has them."""
    from peftcli.config.schema import OptimConfig
    from peftcli.training import optimiser

    for stage in method.stages(steps):
        stage.start(model)
        built = optimiser.build(OptimConfig(lr=5e-4), model, method.parameter_groups(model))
        method.take_optimiser(model, built)
        yield stage.name, stage.steps, built


def steps(model: str, count: int) -> dict[str, float]:
    """Median over each stage of (our step / LoRA's on the same batch), and of whole runs; the order changes."""
    ours, method, chosen = sparse(model)
    print(f"{model}: {trained(ours):,} trained parameters of ours, {chosen}, {BATCH} pictures a step", flush=True)
    theirs, optimiser = lora(model, trained(ours))
    ours.train(), theirs.train()
    pixels, found, together = pictures(BATCH), {}, [0.0, 0.0]
    advance(theirs, optimiser, pixels, chosen)
    for name, length, built in stages(method, ours, count):
        rows = []
        for step in range(length):
            turn = [(ours, built), (theirs, optimiser)]
            taken = [advance(*arm, pixels, chosen) for arm in (turn if step % 2 else turn[::-1])]
            rows.append(taken if step % 2 else taken[::-1])
        together = [before + sum(row[arm] for row in rows) for arm, before in enumerate(together)]
        found[f"step, {model}, {name} / lora"] = median(mine / other for mine, other in rows)
        found[f"step, {model}, {name} (s)"] = median(mine for mine, _ in rows)
        found[f"step, {model}, lora beside it (s)"] = median(other for _, other in rows)
    return {**found, f"step, {model}, all stages / lora": together[0] / together[1]}


def memory(model: str) -> dict[str, float]:
    """Ratio of peak resident memory over the steps, the program itself and the loaded base in both."""
    peaks = {}
    for arm in ("sparse", "lora"):
        command = [sys.executable, __file__, "peak", "--models", model, "--arm", arm]
        peaks[arm] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    found = {f"memory, {model}, {arm} (MB)": held / 1e6 for arm, held in peaks.items()}
    return {**found, f"memory, {model}, sparse / lora": peaks["sparse"] / peaks["lora"]}


def peak(model: str, arm: str) -> None:
    """Print the largest resident size over a few steps of one arm, in bytes: ours in the stage that prunes."""
    wrapped, method, chosen = sparse(model)
    parameters = trained(wrapped)
    *_, (_, _, optimiser) = list(stages(method, wrapped, STEPS))[:-1]
    if arm == "lora":
        del wrapped, method
        wrapped, optimiser = lora(model, parameters)
    pixels = pictures(BATCH)
    wrapped.train()
    print(largest(lambda: advance(wrapped, optimiser, pixels, chosen), 6))


def latency(model: str, patience: float) -> dict[str, float]:
    """The forms of pruned modules, put into one base in turn: median share of the base's time, and milliseconds."""
    import torch

    from peftcli.training import costs

    found = {}
    for place, settings in PLACES[model].items():
        wrapped, method, chosen = pruned(model, settings)
        batches = costs.batches_of({"pixel_values": pictures(32)})
        told = costs.measure(wrapped, method.forms(wrapped), batches, chosen, torch.device("cpu"), patience)
        for row, size in product(told["rows"], told["rows"][0]["latency"]):
            key, clock = f"latency, {model}, {place}, batch {size}, {row['form']}", row["latency"][size]
            found |= {f"{key} (ms)": clock["median"], f"{key}, turns": clock["turns"]}
            found |= {f"{key}, p95 (ms)": clock["p95"]} if clock["p95"] else {}
            found |= {f"{key} / base": clock["ratio"]} if row["form"] != "base" else {}
    return found


def pruned(model: str, settings: dict[str, Any]) -> tuple[Any, Any, str]:
    """Modules with the share of their units that is left, the same in each: none vanishes, which is the worst case."""
    import torch

    from peftcli.methods.sparse_adapter import compaction

    wrapped, method, chosen = sparse(model, **settings)
    for _, layer in compaction.layers(wrapped, "default"):
        for tensor in layer.tensors("default").values():
            torch.nn.init.normal_(tensor, std=0.02)
        layer.prune("default", {"units": torch.arange(UNITS) < round((1 - SPARSITY) * UNITS)})
    method.finish(wrapped)
    return wrapped, method, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["step", "memory", "latency", "peak"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--patience", type=float, default=3, help="of the latencies, as a report takes it")
    parser.add_argument("--arm", choices=["sparse", "lora"], default="sparse")
    parser.add_argument("--assert", dest="hold", action="store_true", help="fail where a bound is not met")
    given = parser.parse_args()
    if "peak" in given.what:
        return peak(given.models[0], given.arm)
    figures: dict[str, float] = {}
    for model in given.models:
        figures |= steps(model, given.steps) if "step" in given.what else {}
        figures |= memory(model) if "memory" in given.what else {}
        figures |= latency(model, given.patience) if "latency" in given.what else {}
    missed = []
    for name, value in figures.items():
        bound = (
            BOUNDS[name.split(",")[0]]
            if " / " in name and "dense" not in name and "masked" not in name
            else float("inf")
        )
        print(f"{name}: {value:.4g}" + (f"  (bound {bound})" if bound < float("inf") else ""))
        missed += [name] if value > bound else []
    if given.hold and missed:
        raise SystemExit(f"a bound is not met: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
