"""Pre-train a small Mamba on WordNet's glosses: the model that ships as peftcli/bundled/mamba-wordnet.

    peft samples fetch wordnet
    python scripts/pretrain_mamba.py --size medium --steps 6000 --threads 2 --out build/mamba-wordnet
    python scripts/pretrain_mamba.py --size medium --steps 6000 --threads 2 --out build/mamba-wordnet --resume

What comes out follows from the arguments, not from how busy the machine is. OUT is a whole model from the first
checkpoint on; what `--resume` needs beyond it stands in OUT.work. R rows of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mamba_card import write_card
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from wordnet_corpus import IGNORED, Corpus, batches, corpus, encode, pad, predicted_bytes, train_tokenizer

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 3, "state_size": 16},
    "medium": {"hidden_size": 112, "num_hidden_layers": 4, "state_size": 16},
    "large": {"hidden_size": 160, "num_hidden_layers": 5, "state_size": 16},
}
STATE = "state.safetensors"


@dataclass(frozen=True)
class Plan:
    """How to train. `tokens` are those of a batch, padding included; the rate is the highest."""

    steps: int
    tokens: int = 2048
    rate: float = 6e-3
    warmup: int = 200
    decay: float = 0.1
    clip: float = 1.0
    bf16: bool = False
    threads: int = 2
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    """Steps between checkpoints, each with the held-out loss."""

    def rate_at(self, step: int) -> float:
        """A linear start, then a cosine to zero."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


class Run:
    """A model in training, its optimiser, and where both are kept."""

    def __init__(self, data: Corpus, shape: dict[str, int], plan: Plan, out: Path):
        self.plan, self.out, self.work = plan, out, out.with_name(f"{out.name}.work")
        self.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = train_tokenizer(data.train)
        self.train_set, self.held_out = encode(data.train, self.tokenizer), encode(data.held_out, self.tokenizer)
        torch.manual_seed(plan.seed)
        self.model = new_model(shape, self.tokenizer)
        self.optimiser = optimiser(self.model, plan)
        self.log: list[dict[str, Any]] = []
        self.step, self.tokens, self.before, self.started = 0, 0, 0.0, time.monotonic()

    def go_on(self) -> None:
        """Continue from the last checkpoint."""
        with safe_open(self.work / STATE, "pt") as opened:
            meta = json.loads(opened.metadata()["run"])
            if meta["plan"] != vars(self.plan):
                raise SystemExit(f"{self.work} was begun with other arguments: {meta['plan']}")
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        self.step, self.tokens, self.before, self.log = (meta[key] for key in ("step", "tokens", "seconds", "log"))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[f"value.{name}"])
                moments = {key: state[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
                self.optimiser.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}

    def run(self) -> dict[str, Any]:
        """Train to the last step; what the shipped weights measure, read back as anybody would."""
        lengths = np.array([len(ids) for ids in self.train_set])
        losses: list[float] = []
        for batch in islice(batches(lengths, self.plan.tokens, self.plan.seed), self.step, self.plan.steps):
            losses.append(self._step([self.train_set[number] for number in batch]))
            self.tokens += int(lengths[batch].sum())
            self.step += 1
            last = self.step == self.plan.steps
            if self.step % self.plan.log_every == 0 or last:
                self._tell(train_loss=round(sum(losses) / len(losses), 4))
                losses = []
            if self.step % self.plan.save_every == 0 or last:
                self._tell(**self.measure(self.model))
                self.save()
        shipped = AutoModelForCausalLM.from_pretrained(self.out, dtype="auto")
        with_scan(shipped)
        self._tell(shipped=True, **self.measure(shipped))
        self.ship()
        return self.log[-1]

    def _step(self, documents: list[np.ndarray]) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.bf16):
            total, count = loss(self.model, documents)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip, error_if_nonfinite=True)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return total.item() / count

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        """Held-out loss in nats a token and, its tokens' ends included, in bits a byte."""
        ordered = sorted(self.held_out, key=len)
        sums = [loss(model, ordered[start : start + 50]) for start in range(0, len(ordered), 50)]
        nats, count = sum(float(total) for total, _ in sums), sum(count for _, count in sums)
        bits = nats / math.log(2) / predicted_bytes(self.held_out, self.tokenizer)
        return {"held_out_loss": round(nats / count, 4), "bits_per_byte": round(bits, 4)}

    def _tell(self, **what: Any) -> None:
        self.log.append({"step": self.step, "tokens": self.tokens, **what, "seconds": round(self.seconds())})
        print(json.dumps(self.log[-1]), flush=True)

    def seconds(self) -> float:
        """Spent on training so far, before it was stopped too."""
        return self.before + time.monotonic() - self.started

    def save(self) -> None:
        """A checkpoint: what `--resume` reads, and the model as it ships."""
        meta = {
            "plan": vars(self.plan), "step": self.step, "tokens": self.tokens, "seconds": self.seconds(),
            "log": self.log,
        }  # fmt: skip
        tensors = {}
        for name, parameter in self.model.named_parameters():
            kept = self.optimiser.state[parameter]
            tensors |= {f"value.{name}": parameter, f"exp_avg.{name}": kept["exp_avg"]}
            tensors[f"exp_avg_sq.{name}"] = kept["exp_avg_sq"]
        beside = self.work / "unfinished"
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, beside, {"run": json.dumps(meta)})
        os.replace(beside, self.work / STATE)
        self.ship()

    def ship(self) -> None:
        """The folder that others load: matrices in bfloat16, what the scan is sensitive to in float32."""
        self.out.mkdir(parents=True, exist_ok=True)
        weights = {
            name: parameter.detach().to(torch.bfloat16 if is_matrix(name, parameter) else torch.float32)
            for name, parameter in self.model.named_parameters()
        }
        save_file(weights, self.out / "model.safetensors", {"format": "pt"})
        (self.out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
        self.model.config.save_pretrained(self.out)
        self.tokenizer.save_pretrained(self.out)
        (self.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.log), encoding="utf-8")
        write_card(self.out, self.model, vars(self.plan), self.log, self._documents())

    def _documents(self) -> tuple[int, int, int]:
        return len(self.train_set), len(self.held_out), sum(map(len, self.train_set))


def new_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> MambaForCausalLM:
    """Random weights. The configuration says float32, so that the bfloat16 matrices become that as they are read."""
    end = tokenizer.eos_token_id
    config = MambaConfig(
        **shape, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end,
        initializer_range=0.02, rescale_prenorm_residual=True, dtype="float32", architectures=["MambaForCausalLM"],
    )  # fmt: skip
    model = MambaForCausalLM(config)
    config.rescale_prenorm_residual = False  # Transformers 5.23 would scale out_proj again whenever it is loaded
    with_scan(model)
    return model


def with_scan(model: torch.nn.Module) -> None:
    """Our scan in place of Transformers' loop."""
    from peftcli.models.mamba_mixer import install

    install(model)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether it is a projection, a convolution or the embedding; A_log has two dimensions but is none."""
    return parameter.ndim > 1 and not name.endswith("A_log")


def optimiser(model: torch.nn.Module, plan: Plan) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if is_matrix(name, p)], "weight_decay": plan.decay},
        {"params": [p for name, p in named if not is_matrix(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95))


def loss(model: torch.nn.Module, documents: list[np.ndarray]) -> tuple[torch.Tensor, int]:
    """Sum over the predicted tokens in nats, and how many they are."""
    inputs_RL, labels_RL = pad(documents)
    logits_RLV = model(inputs_RL[:, :-1], use_cache=False).logits
    total = torch.nn.functional.cross_entropy(
        logits_RLV.float().flatten(0, 1), labels_RL[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total, int((labels_RL[:, 1:] != IGNORED).sum())


def main() -> None:
    """Train one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="of a batch, padding included")
    parser.add_argument("--rate", type=float, default=Plan.rate, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=Plan.threads)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--save-every", type=int, default=Plan.save_every)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    asked = vars(parser.parse_args())
    size, out, resume = (asked.pop(key) for key in ("size", "out", "resume"))
    plan = Plan(**asked)
    torch.set_num_threads(plan.threads)
    run = Run(corpus(), SIZES[size], plan, out)
    if resume:
        run.go_on()
    run.run()


if __name__ == "__main__":
    main()
