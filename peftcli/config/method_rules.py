"""Values that do not go together where one of them is the method's: a table of rules."""

from __future__ import annotations

from peftcli.config.rule import Rule

METHOD_RULES = (
    Rule(
        ("method.mode", "method.name", "task.type"),
        lambda mode, name, task: name == "rowcol" and mode in ("compress", "tie") and task == "episodes",
        "compress and tie learn from the original's answers, and few-shot tasks have none but through their support",
        "merge a task's model first (peft merge RUN --support FOLDER --to DIR), and take model.name=DIR",
    ),
    Rule(
        ("model.quantization", "method.name"),
        lambda kind, method: kind is not None and method in ("full", "sdt", "smat"),
        "model.quantization holds matrices in few bits, and this method trains weights themselves",
        "add model.quantization=null, or train an adapter: method=kpsvd or method=lora",
    ),
    Rule(
        ("model.quantization", "method.mode"),
        lambda kind, mode: kind is not None and mode in ("compress", "tie"),
        "model.quantization holds matrices in few bits, and method.mode=compress or tie makes other ones",
        "add model.quantization=null",
    ),
    Rule(
        ("method.init", "model.quantization"),
        lambda init, kind: kind is not None and init not in ("default", "gaussian"),
        "method.init needs the weights' own numbers, and model.quantization holds them in few bits",
        "add method.init=default, or model.quantization=null",
    ),
    Rule(
        ("method.use_dora", "model.quantization"),
        lambda dora, kind: dora and kind == "int8",
        "method.use_dora does not train on matrices in int8",
        "add model.quantization=nf4, or method.use_dora=false",
    ),
    Rule(
        ("launch.strategy", "method.name", "training.precision"),
        lambda strategy, method, precision: strategy == "fsdp" and method == "full" and precision == "fp16",
        "training.precision=fp16 scales the loss, which is not done for gradients in parts",
        "add training.precision=bf16",
    ),
    Rule(
        ("method.name", "task.type"),
        lambda method, task: method == "smat" and task != "episodes",
        "method smat learns to adapt to few-shot tasks, and this task has none",
        "choose task=episodes and data of domains, such as data=few-shot-pictures",
    ),
    Rule(
        ("method.name", "task.type", "task.head"),
        lambda method, task, head: (
            method == "linear_probe" and task != "images" and (task != "classification" or head != "linear")
        ),
        "method linear_probe trains a linear head, and this task has none",
        "use a classification task with task.head=linear",
    ),
    Rule(
        ("method.dropout", "method.lora_targets"),
        lambda dropout, targets: dropout > 0 and not targets,
        "method.dropout drops inputs of LoRA, and method.lora_targets is empty",
        "add method.dropout=0, or name a projection: method.lora_targets=[ssm.out]",
    ),
    Rule(
        ("method.selector", "method.channels", "method.states"),
        lambda selector, *amounts: selector == "random" and "auto" in amounts,
        "method.selector is random, and auto asks for a share of a score that means nothing there",
        "give method.channels and method.states counts or shares",
    ),
    Rule(
        ("method.channels", "method.pruned"),
        lambda *amounts: all(isinstance(one, float) and one <= 1 for one in amounts) and sum(amounts) > 1,
        "method.channels and method.pruned are together more than all channels",
        "a channel is trained or pruned, not both",
    ),
    Rule(
        ("method.warmup",),
        lambda warmup: isinstance(warmup, float) and warmup == 1,
        "method.warmup takes all steps, and leaves none to train what it selects",
        "for a single step write method.warmup=1",
    ),
    Rule(
        ("method.probe", "method.few", "method.final"),
        lambda *shares: sum(shares) >= 1,
        "method.probe, method.few and method.final leave no steps for the stage that prunes",
        "together they must stay below 1",
    ),
    Rule(
        ("method.experts", "method.expert_choices"),
        lambda experts, choices: experts == "auto" and not choices,
        "method.experts=auto has nothing to choose among: method.expert_choices is empty",
        "for example method.expert_choices=[4,8]",
    ),
    Rule(
        ("method.sparsity", "method.sparsity_choices"),
        lambda sparsity, choices: sparsity == "auto" and not choices,
        "method.sparsity=auto has nothing to choose among: method.sparsity_choices is empty",
        "for example method.sparsity_choices=[0.8,0.9]",
    ),
    Rule(
        ("method.wide", "method.sparsity"),
        lambda wide, sparsity: wide > 1 and sparsity != "auto",
        "method.wide decides the sparsity, 1 - 1/wide, and method.sparsity is a number",
        "add method.sparsity=auto; or method.wide=1, and a larger method.r",
    ),
    Rule(
        ("method.chosen", "method.few"),
        lambda chosen, few: chosen is not None and few == 0,
        "method.chosen goes by what the second stage shows, and method.few=0 leaves it no steps",
        "for example method.few=0.2",
    ),
    Rule(
        ("method.energy", "method.rank"),
        lambda energy, rank: energy is not None and rank != "auto",
        "method.energy chooses ranks, and method.rank is a number",
        "add method.rank=auto, or method.energy=null",
    ),
    Rule(
        ("method.budget", "method.rank"),
        lambda budget, rank: budget is not None and rank != "auto",
        "method.budget chooses ranks, and method.rank is a number",
        "add method.rank=auto, or method.budget=null",
    ),
    Rule(
        ("method.name", "method.rank", "method.energy", "method.budget"),
        lambda method, rank, energy, budget: (
            method == "rowcol" and rank == "auto" and (energy is None) == (budget is None)
        ),
        "method.rank=auto chooses by method.energy or by method.budget, by just one of them",
        "for example method.energy=0.9",
    ),
    Rule(
        ("method.worth", "method.budget", "method.mode"),
        lambda worth, budget, mode: worth != "energy" and budget is None and mode != "compress",
        "method.worth says what a budget is spent on, and method.budget is not given",
        "add method.rank=auto and method.budget, or method.worth=energy",
    ),
    Rule(
        ("method.mode", "method.target"),
        lambda mode, target: mode == "compress" and len(target) != 1,
        "method.mode=compress has one target: parameters, flops or latency",
        "for example method.target.parameters=50%; ~method.target.flops takes one away",
    ),
    Rule(
        ("method.target", "method.mode"),
        lambda target, mode: bool(target) and mode != "compress",
        "method.target is for method.mode=compress",
        "add method.mode=compress, or remove method.target",
    ),
    Rule(
        ("method.prune", "method.mode"),
        lambda prune, mode: prune > 0 and mode != "compress",
        "method.prune is for method.mode=compress",
        "add method.mode=compress, or method.prune=0",
    ),
    Rule(
        ("method.basis", "method.mode"),
        lambda basis, mode: basis == "gradient" and mode == "compress",
        "method.basis=gradient says what a core may learn, and method.mode=compress has none",
        "method.basis=data or weight",
    ),
    Rule(
        ("method.distill.weight", "method.distill.features", "method.distill.layerwise_steps", "method.mode"),
        lambda weight, features, steps, mode: mode == "adapter" and (weight, features, steps) != (0.5, 1.0, 0),
        "method.distill is for method.mode=compress and tie",
        "add method.mode=tie, or leave method.distill out",
    ),
    Rule(
        ("method.layout", "method.mode"),
        lambda layout, mode: layout != "base" and mode != "tie",
        "method.layout is for method.mode=tie",
        "add method.mode=tie, or method.layout=base",
    ),
    Rule(
        ("method.diagonal", "method.mode"),
        lambda diagonal, mode: diagonal and mode != "tie",
        "method.diagonal is for method.mode=tie",
        "add method.mode=tie, or method.diagonal=false",
    ),
    Rule(
        ("method.min_rank", "method.max_rank"),
        lambda least, most: least > most,
        "method.min_rank is larger than method.max_rank",
        "leave room between them, or make them equal",
    ),
    Rule(
        ("method.source", "method.tuned"),
        lambda source, tuned: source == "delta" and not tuned,
        "method.source is delta, and method.tuned does not say where the fine-tuned model is",
        "for example method.tuned=runs/NAME/model, of a run of method=full",
    ),
    Rule(
        ("method.tuned", "method.source"),
        lambda tuned, source: bool(tuned) and source != "delta",
        "method.tuned only means something with method.source=delta",
        "add method.source=delta, or remove method.tuned",
    ),
)
