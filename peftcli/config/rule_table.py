"""Values that do not go together: a table of rules, and what each kind of task measures."""

from __future__ import annotations

from peftcli.config.method_rules import METHOD_RULES
from peftcli.config.rule import Rule
from peftcli.config.schema import AugmentConfig

METRICS = {
    "classification": ("accuracy", "f1_macro", "balanced_accuracy", "loss"),
    "generation": ("loss", "perplexity"),
    "images": (
        "accuracy", "balanced_accuracy", "f1_macro", "auroc", "average_precision", "recall_at_false_alarms",
        "calibration_error", "exact_match", "loss",
    ),
    "episodes": ("accuracy", "loss"),
}  # fmt: skip
TEXTS = ("rouge_1", "rouge_2", "rouge_l", "bleu", "exact_match")
SCORED: dict[str, tuple[str, ...]] = {
    "text": (*TEXTS, "answer_accuracy"),
    "number": ("exact_match_strict", "exact_match_flexible"),
    "math": ("math_verify_strict", "math_verify"),
    "code": ("pass_at_1", "pass_at_5", "pass_at_10", "pass_at_100"),
    "sql": ("execution_match", *TEXTS),
}
"""What each `task.scoring` measures on generated rows."""

CHANGES = {name: off for name, off in vars(AugmentConfig()).items() if name != "randaugment_strength"}
"""What changes a training picture, and the value that does not."""

RULES = (
    Rule(
        ("data.streaming", "training.max_steps"),
        lambda streaming, steps: streaming and steps is None,
        "data.streaming needs training.max_steps: the number of rows is not known beforehand",
        "add training.max_steps=1000, or data.streaming=false",
    ),
    Rule(
        ("data.streaming", "training.group_by_length"),
        lambda streaming, grouped: streaming and grouped,
        "data.streaming and training.group_by_length do not go together: lengths are not known beforehand",
        "add training.group_by_length=false",
    ),
    Rule(
        ("data.where",),
        lambda where: any(not isinstance(columns, dict) for columns in where.values()),
        "data.where names no column of a split",
        "for example data.where={train: {cell: mono}}",
    ),
    Rule(
        ("data.where", "data.streaming"),
        lambda where, streaming: streaming and "train" in where,
        "data.where and data.streaming do not go together: training rows that are streamed are all used",
        "remove data.where.train, or add data.streaming=false",
    ),
    Rule(
        ("data.source", "data.files"),
        lambda source, files: source == "files" and not files.get("train"),
        "data.source is files, but data.files names no file of the train split",
        "for example data.files.train=rows.jsonl",
    ),
    Rule(
        ("data.files", "data.source"),
        lambda files, source: bool(files) and source != "files",
        "data.files is given, but data.source is not files",
        "add data.source=files, or remove data.files",
    ),
    Rule(
        ("data.source", "data.domains"),
        lambda source, domains: source == "domains" and not domains,
        "data.source is domains, and data.domains names none",
        "for example data.domains.mine={source: files, files: {train: FOLDER}}",
    ),
    Rule(
        ("data.domains", "data.source"),
        lambda domains, source: bool(domains) and source != "domains",
        "data.domains is given, but data.source is not domains",
        "add data.source=domains, or remove data.domains",
    ),
    Rule(
        ("data.source", "task.type"),
        lambda source, task: (source == "domains") != (task == "episodes"),
        "data.source=domains and task.type=episodes go together: tasks are drawn from domains of classes",
        "choose both: data=few-shot-pictures task=episodes, or neither",
    ),
    Rule(
        ("data.rows", "data.source"),
        lambda rows, source: bool(rows) and source == "domains",
        "data.rows draws rows, and would leave classes of domains without any",
        "limit what a task takes instead: task.support, task.class_support",
    ),
    Rule(
        ("task.ways",),
        lambda ways: ways[0] > ways[1],
        "task.ways has its least above its most",
        "for example task.ways=[5,20]",
    ),
    Rule(
        ("data.source", "data.name"),
        lambda source, name: source in ("hub", "sample", "bundled") and not name,
        "data.name is missing: a hub id, or the name of a sample or of bundled rows",
        "peft samples list names the samples, peft ls data what is bundled",
    ),
    Rule(
        ("data.subset", "data.source"),
        lambda subset, source: subset is not None and source != "hub",
        "data.subset only means something with data.source=hub",
        "remove data.subset",
    ),
    Rule(
        ("data.validation_share", "data.test_share"),
        lambda validation, test: validation < 1 and test < 1 and validation + test >= 1,
        "data.validation_share and data.test_share leave no training rows",
        "together they must stay below 1",
    ),
    Rule(("model.name",), lambda name: not name, "model.name is empty"),
    Rule(
        ("model.weights", "model.source", "model.shape"),
        lambda weights, source, shape: weights == "random" and source == "hub" and not shape,
        "model.weights=random needs the shape of the model: model.shape, or a model in a folder, a sample or bundled",
        "choose a model that has one, such as model=smollm2-135m",
    ),
    Rule(
        ("model.shape",),
        lambda shape: bool(shape) and "model_type" not in shape,
        "model.shape has no model_type",
        "for example model_type: llama",
    ),
    Rule(
        ("model.revision", "model.source"),
        lambda revision, source: revision is not None and source != "hub",
        "model.revision only means something with model.source=hub",
        "remove model.revision",
    ),
    Rule(
        ("data.streaming", "task.type"),
        lambda streaming, task: task in ("images", "episodes") and streaming,
        "data.streaming is for text: pictures are read while training in any case, and tasks are drawn from all rows",
        "add data.streaming=false",
    ),
    Rule(
        ("training.batch_tokens", "task.type"),
        lambda tokens, task: task in ("images", "episodes") and tokens is not None,
        "training.batch_tokens counts tokens, and pictures and few-shot tasks have none",
        "give training.batch_size a number of them",
    ),
    Rule(
        ("training.cache_features", "task.type"),
        lambda cached, task: cached is True and task != "images",
        "training.cache_features is for pictures: what a frozen part makes of a text depends on the batch's padding",
        "add training.cache_features=auto",
    ),
    Rule(
        ("training.cache_features", *(f"task.augment.{name}" for name in CHANGES)),
        lambda cached, *changes: cached is True and changes != tuple(CHANGES.values()),
        "training.cache_features keeps what the model makes of each picture, and task.augment changes them each time",
        "add training.cache_features=auto, or remove task.augment",
    ),
    Rule(
        ("training.cache_features", "launch.world"),
        lambda cached, processes: cached is True and processes > 1,
        "training.cache_features is for one process: each of several would keep all pictures",
        "add training.cache_features=auto, or launch.processes=1",
    ),
    Rule(
        ("launch.gpus_per_node", "launch.processes"),
        lambda gpus, processes: gpus is not None and processes not in (1, gpus),
        "launch.gpus_per_node and launch.processes differ: there is one worker for each GPU",
        "remove launch.processes",
    ),
    Rule(
        ("launch.gpus_per_node", "launch.device"),
        lambda gpus, device: gpus is not None and device not in ("auto", "cuda"),
        "launch.gpus_per_node asks for GPUs, and launch.device is another one",
        "remove launch.device",
    ),
    Rule(
        ("launch.gpu_type", "launch.gpus_per_node"),
        lambda kind, gpus: kind is not None and gpus is None,
        "launch.gpu_type needs launch.gpus_per_node",
        "for example launch.gpus_per_node=8",
    ),
    Rule(
        ("launch.at_once", "launch.array"),
        lambda most, array: most is not None and array is None,
        "launch.at_once is for the members of a job array",
        "add launch.array=FILE, or remove launch.at_once",
    ),
    Rule(
        ("launch.strategy", "launch.world"),
        lambda strategy, world: strategy != "ddp" and world == 1,
        "launch.strategy cuts the model up among processes, and there is one",
        "add --processes 2 or more, or launch.strategy=ddp",
    ),
    Rule(
        ("launch.offload", "launch.strategy"),
        lambda offload, strategy: offload and strategy == "ddp",
        "launch.offload sends parts of the model to the CPU's memory, and with launch.strategy=ddp there are no parts",
        "add launch.strategy=fsdp, or launch.offload=false",
    ),
    Rule(
        ("launch.strategy", "model.quantization"),
        lambda strategy, packed: strategy != "ddp" and packed is not None,
        "weights in few bits are not cut up among processes",
        "add model.quantization=null, or launch.strategy=ddp",
    ),
    Rule(
        ("launch.strategy", "launch.device"),
        lambda strategy, device: strategy.startswith("deepspeed") and device in ("cpu", "mps"),
        "DeepSpeed is for GPUs here",
        "add launch.strategy=fsdp, which also runs on CPUs",
    ),
    Rule(
        ("task.positive", "task.multilabel"),
        lambda positive, several: positive is not None and several,
        "task.positive is for two labels of which a picture has one, and task.multilabel is on",
        "remove task.positive, or add task.multilabel=false",
    ),
    Rule(
        ("task.best_metric", "task.type", "task.multilabel"),
        lambda metric, task, several: task == "images" and metric == "exact_match" and not several,
        "task.best_metric=exact_match is for pictures with several labels; with one it is the accuracy",
        "add task.best_metric=accuracy",
    ),
    Rule(
        ("task.balanced_sampling", "task.multilabel"),
        lambda balanced, several: balanced and several,
        "task.balanced_sampling needs one label a picture, and task.multilabel is on",
        "add task.class_weights=true instead",
    ),
    Rule(
        ("task.label_smoothing", "task.multilabel"),
        lambda share, several: share > 0 and several,
        "task.label_smoothing needs one label a picture, and task.multilabel is on",
        "add task.label_smoothing=0",
    ),
    Rule(
        ("training.micro_batch_size", "training.batch_size", "training.batch_tokens"),
        lambda micro, batch, tokens: micro is not None and tokens is None and micro > batch,
        "training.micro_batch_size is larger than training.batch_size",
        "a micro batch is a part of a batch",
    ),
    Rule(
        ("training.early_stopping", "training.eval_every"),
        lambda patience, every: patience is not None and every == "end",
        "training.early_stopping needs measurements before the end",
        "add training.eval_every=epoch",
    ),
    Rule(
        ("task.best_metric", "task.generated_rows"),
        lambda metric, rows: rows == 0 and any(metric in names for names in SCORED.values()),
        "task.best_metric is measured on generated rows, and task.generated_rows is 0",
        "add task.generated_rows=32, or task.best_metric=loss",
    ),
    Rule(
        ("task.best_metric", "task.answer"),
        lambda metric, answer: metric == "answer_accuracy" and answer is None,
        "task.best_metric is answer_accuracy, and task.answer does not say what an answer is",
        "give task.answer a regular expression with one group",
    ),
    Rule(
        ("task.best_metric", "task.databases"),
        lambda metric, databases: metric == "execution_match" and databases is None,
        "task.best_metric is execution_match, and task.databases does not say where the databases are",
        "give task.databases the folder with DATABASE/DATABASE.sqlite, or add task.best_metric=loss",
    ),
    Rule(
        ("task.best_metric", "task.samples"),
        lambda metric, samples: metric.startswith("pass_at_") and samples < int(metric.rpartition("_")[2]),
        "task.best_metric is pass@k for more programs than task.samples draws",
        "add task.samples=10 for pass_at_10, or task.best_metric=pass_at_1",
    ),
    Rule(
        ("task.scoring", "task.tests"),
        lambda scoring, tests: scoring == "code" and tests is None,
        "task.scoring is code, and task.tests does not say what is run after a program",
        'for example task.tests="{tests}", with the column in data.columns.tests',
    ),
    Rule(
        ("task.tests", "task.scoring"),
        lambda tests, scoring: tests is not None and scoring != "code",
        "task.tests only means something with task.scoring=code",
        "add task.scoring=code, or remove task.tests",
    ),
    Rule(
        ("task.databases", "task.scoring"),
        lambda databases, scoring: databases is not None and scoring != "sql",
        "task.databases only means something with task.scoring=sql",
        "add task.scoring=sql, or remove task.databases",
    ),
    Rule(
        ("task.answer", "task.scoring"),
        lambda answer, scoring: answer is not None and scoring != "text",
        "task.answer only means something with task.scoring=text",
        "add task.scoring=text, or remove task.answer",
    ),
    Rule(
        ("task.samples", "task.scoring"),
        lambda samples, scoring: samples > 1 and scoring != "code",
        "task.samples draws several answers a row for pass@k, which task.scoring=code alone measures",
        "add task.samples=1, or task.scoring=code",
    ),
    Rule(
        ("task.samples", "task.beams"),
        lambda samples, beams: samples > 1 and beams > 1,
        "task.samples draws answers at random, and task.beams looks for the likeliest one",
        "add task.samples=1 or task.beams=1",
    ),
    Rule(
        ("task.shots", "task.template"),
        lambda shots, template: shots > 0 and template != "plain",
        "task.shots puts rows before a plain prompt, not into a chat",
        "add task.template=plain, or task.shots=0",
    ),
    Rule(
        ("task.system", "task.template"),
        lambda system, template: system is not None and template != "chat",
        "task.system only means something with task.template=chat",
        "add task.template=chat, or remove task.system",
    ),
    *METHOD_RULES,
)
