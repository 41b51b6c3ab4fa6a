"""KPSVD against PEFT's LoRA and LoKr: time of a step, memory, and time and quality of the initialisation.

    python scripts/benchmark_kpsvd.py step     # steps of all three in turn, in one process, at 1, 2 and 8 terms
    python scripts/benchmark_kpsvd.py memory   # peak memory, each in a process of its own
    python scripts/benchmark_kpsvd.py init     # 64 weights of 4096 x 4096, and SmolLM2-135M's own
    python scripts/benchmark_kpsvd.py step memory init --assert   # also holds them to the bounds

Case of the first two: SmolLM2-135M, q and v, 4 x 128 tokens, bf16, AdamW, trained parameters as equal as their shapes
allow. Needs the sample smollm2-135m. Medians; a ratio below 1 means that ours is faster or smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

from resident import largest

TERMS = (1, 2, 8)
ARMS = ("kpsvd", "lora", "lokr")
NOTHING = "nothing"
"""An arm without an adapter whose first layer's inputs want a gradient all the same: what no adapter can undercut."""
TARGETS = ("q_proj", "v_proj")
BATCH, LENGTH = 4, 128
BOUNDS = {
    **{f"step, {terms} terms, kpsvd / lora": (0, 1.08) for terms in TERMS},
    **{f"step, {terms} terms, kpsvd / lokr": (0, 0.92) for terms in TERMS},
    **{f"memory, {terms} terms, kpsvd / lora": (0, 1.03) for terms in TERMS},
    "init, seconds": (0, 120),
    "init, energy of the exact terms, random weights": (0.98, 1.001),
    "init, energy of the exact terms, SmolLM2": (0.995, 1.001),
}


def build(arm: str, terms: int) -> tuple[Any, Any]:
    """The model with an adapter of this kind, and its optimiser."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from peftcli import register_with_peft
    from peftcli.config.paths import sample_folder

    register_with_peft()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(sample_folder("smollm2-135m"), dtype=torch.bfloat16)
    base.config.use_cache = False
    if arm == NOTHING:
        base.requires_grad_(False).enable_input_require_grads()
        return base.train(), None
    model = get_peft_model(base, configuration(arm, terms)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)


def configuration(arm: str, terms: int) -> Any:
    """An adapter with the parameters of so many terms; LoKr's one term grows with the inequality of its factors."""
    from peft import LoKrConfig, LoraConfig

    from peftcli.methods.kpsvd.config import KpsvdConfig

    if arm == "kpsvd":
        return KpsvdConfig(rank=terms, target_modules=list(TARGETS))
    if arm == "lora":
        return LoraConfig(r=terms, lora_alpha=terms, target_modules=list(TARGETS))
    factor = {1: 24, 2: 12, 8: 6}[terms]
    return LoKrConfig(r=10**6, alpha=10**6, decompose_factor=factor, target_modules=list(TARGETS))


def batch() -> Any:
    """Token ids; their values do not matter to the time."""
    import torch

    return torch.randint(10, 40_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def advance(model: Any, optimiser: Any, ids_BL: Any) -> float:
    """One step; its seconds."""
    import torch

    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids_BL, labels=ids_BL).loss
    loss.backward()
    if optimiser is not None:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def steps(count: int) -> dict[str, float]:
    """Medians over turns of (our step / another's), the order changing from turn to turn."""
    from peft.helpers import disable_input_dtype_casting

    found, ids_BL = {}, batch()
    arms = [*ARMS, NOTHING]
    for terms in TERMS:
        models = {arm: build(arm, terms) for arm in arms}
        for arm in ARMS:
            model = models[arm][0]
            print(f"{terms} terms, {arm}: {model.get_nb_trainable_parameters()[0]:,} trained parameters", flush=True)
        turns = []
        for turn in range(count + 3):
            row = {}
            for arm in arms[turn % 4 :] + arms[: turn % 4]:
                casting = nullcontext() if arm == NOTHING else disable_input_dtype_casting(models[arm][0])
                with casting:  # autocast does it, as in the training loop
                    row[arm] = advance(*models[arm], ids_BL)
            turns.append(row)
        turns = turns[3:]
        for arm in arms:
            found[f"step, {terms} terms, {arm} (s)"] = median(row[arm] for row in turns)
        for arm in ARMS[1:]:
            found[f"step, {terms} terms, kpsvd / {arm}"] = median(row["kpsvd"] / row[arm] for row in turns)
            found[f"step, {terms} terms, {NOTHING} / {arm}"] = median(row[NOTHING] / row[arm] for row in turns)
    return found


def memory(count: int) -> dict[str, float]:
    """Ratios of peak resident memory over the steps, initialisation and imports left out."""
    found = {}
    for terms in TERMS:
        peaks = {}
        for arm in ARMS[:2]:
            command = [sys.executable, __file__, "peak", "--arm", arm, "--terms", str(terms), "--steps", str(count)]
            peaks[arm] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found[f"memory, {terms} terms, {arm} (MB)"] = peaks[arm] / 1e6
        found[f"memory, {terms} terms, kpsvd / lora"] = peaks["kpsvd"] / peaks["lora"]
    return found


def peak(arm: str, terms: int, count: int) -> None:
    """Print the largest resident size during the steps of one arm, in bytes."""
    model, optimiser = build(arm, terms)
    ids_BL = batch()
    print(largest(lambda: advance(model, optimiser, ids_BL), count))


def initialisation(modules: int, width: int) -> dict[str, float]:
    """Seconds for LLaMA-2-7B's q and v with random weights, and energy of the terms found over that of the exact."""
    import torch
    from safetensors.torch import load_file

    from peftcli.config.paths import sample_folder
    from peftcli.methods.kpsvd import start
    from peftcli.methods.kpsvd.config import KpsvdConfig

    config, generator = KpsvdConfig(rank=2), torch.Generator().manual_seed(0)
    random = {
        f"layers.{k}": torch.randn(width, width, generator=generator).mul_(0.02).bfloat16() for k in range(modules)
    }
    began = time.perf_counter()
    starts = start.find(random, config)
    seconds = time.perf_counter() - began
    one = "layers.0"
    real = {}
    for file in sample_folder("smollm2-135m").glob("*.safetensors"):
        tensors = load_file(file)
        real |= {name: weight for name, weight in tensors.items() if name.endswith(("q_proj.weight", "v_proj.weight"))}
    shares = [captured(real[name], found) for name, found in start.find(real, config).items()]
    return {
        "init, seconds": seconds,
        "init, energy of the exact terms, random weights": captured(random[one], starts[one]),
        "init, energy of the exact terms, SmolLM2": min(shares),
    }


def captured(weight: Any, found: Any) -> float:
    """Energy of the kept terms, as a share of that of as many exact ones."""
    import torch

    from peftcli.methods.kpsvd.maths import rearrange, total

    kept, terms = found.cut.terms, found.terms
    exact = torch.linalg.svdvals(rearrange(weight.float(), terms.split))[:kept].square().sum()
    # Of what the terms take away, not of the values that came with them.
    left = (weight.float() - total(terms.U[:kept] * terms.sigma[:kept, None, None], terms.V[:kept])).double()
    return ((weight.double().square().sum() - left.square().sum()) / exact).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["step", "memory", "init", "peak"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--arm", choices=ARMS, default="kpsvd")
    parser.add_argument("--terms", type=int, default=1)
    parser.add_argument("--assert", dest="hold", action="store_true", help="fail where a bound is not met")
    given = parser.parse_args()
    if "peak" in given.what:
        return peak(given.arm, given.terms, given.steps)
    figures: dict[str, float] = {}
    if "step" in given.what:
        figures |= steps(given.steps)
    if "memory" in given.what:
        figures |= memory(min(given.steps, 8))
    if "init" in given.what:
        figures |= initialisation(given.modules, given.width)
    missed = []
    for name, value in figures.items():
        low, high = BOUNDS.get(name, (0, float("inf")))
        print(f"{name}: {value:.4g}" + (f"  (bounds {low} to {high})" if name in BOUNDS else ""))
        missed += [] if low <= value <= high else [name]
    if given.hold and missed:
        raise SystemExit(f"a bound is not met: {', '.join(missed)}")


if __name__ == "__main__":
    main()
