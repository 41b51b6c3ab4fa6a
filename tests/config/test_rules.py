"""Ranges and conflicts: each rule fires on its case, points at what was written, and stays silent on valid recipes."""

from __future__ import annotations

import pytest

from peftcli.config import peft_types, rules
from peftcli.config.compose import compose
from peftcli.config.errors import UserError
from peftcli.config.schema import LAUNCHES, TASKS
from peftcli.config.validate import schema_keys

GENERATION = ["task=generation", "data=gsm8k"]
PICTURES = ["model=vit-s14", "method=lora", "~method.channels", "~method.lora_targets", "data=elpv", "task=images"]
FEW_SHOT = ["model=vit-s14", "method=smat", "data=few-shot-pictures", "task=episodes"]
SEVERAL = [*PICTURES, "task.multilabel=true"]
CODE = [*GENERATION, "task.scoring=code", "task.tests='{checks}'"]

SMALLER = ["method=rowcol", "method.mode=compress", "method.target.parameters=50%"]


def found(*overrides: str, recipe: str = "quickstart"):
    with pytest.raises(UserError) as caught:
        compose(recipe, list(overrides))
    return caught.value.mistakes


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=0",
        "optim.lr=-1",
        "optim.lr=inf",
        "optim.lr=nan",
        "optim.betas=[0.9,1]",
        "optim.betas=[-0.1,0.9]",
        "optim.warmup_share=1.01",
        "optim.final_share=-0.1",
        "optim.clip_norm=0",
        "data.validation_share=1",
        "data.test_share=-0.5",
        "data.rows.train=0",
        "training.epochs=0",
        "training.max_steps=0",
        "training.batch_size=0",
        "training.batch_tokens=0",
        "training.micro_batch_size=-1",
        "training.eval_every=0",
        "training.log_every=0",
        "training.save_every=0",
        "training.early_stopping=0",
        "training.keep_checkpoints=0",
        "launch.processes=0",
        "launch.threads=0",
        "method.r=0",
        "method.dropout=1",
        "task.max_length=0",
        "seed=-1",
    ],
)
def test_a_number_out_of_range(override):
    (mistake,) = found(override)
    assert mistake.where == f"override {override}"
    assert "expected" in mistake.what
    assert "5e-324" not in mistake.what


@pytest.mark.parametrize(
    "override",
    ["beams=0", "samples=0", "temperature=0", "top_p=0", "top_p=1.1", "shots=-1", "shots=100", "generated_rows=-1"],
)
def test_a_number_of_generation_out_of_range(override):
    (mistake,) = found(*GENERATION, f"task.{override}")
    assert mistake.where == f"override task.{override}"
    assert "expected" in mistake.what


@pytest.mark.parametrize(
    "override",
    ["energy=0", "energy=-0.5", "energy=1.01", "energy=nan", "budget=0", "min_rank=0", "iterations=0", "alpha=0"],
)
def test_a_number_of_kpsvd_out_of_range(override):
    mistakes = found("method=kpsvd", "method.rank=auto", f"method.{override}")
    assert [mistake.where for mistake in mistakes] == [f"override method.{override}"]
    assert "expected" in mistakes[0].what


@pytest.mark.parametrize(
    "override",
    [
        "method.channels=0",
        "method.channels=-1",
        "method.channels=1.5",
        "method.channels=0.0",
        "method.channels=nan",
        "method.states=-0.25",
        "method.pruned=-1",
        "method.pruned=1.01",
        "method.warmup=0",
    ],
)
def test_neither_a_count_nor_a_share(override):
    (mistake,) = found("method=sdt", override)
    assert mistake.where == f"override {override}"
    assert "expected a count" in mistake.what
    assert override.split("=")[1] in mistake.what


@pytest.mark.parametrize("value", [1, 1.0, 5000, 0.01, "auto"])
def test_a_whole_number_is_a_count_and_any_other_a_share(value):
    channels = compose("quickstart", ["method=sdt", f"method.channels={value}"]).config.method.channels
    assert (channels, type(channels)) == (value, type(value))


@pytest.mark.parametrize("override", ["optim.warmup_share=0", "optim.warmup_share=1", "data.test_share=0.2", "seed=0"])
def test_the_ends_of_a_range_are_allowed(override):
    key, value = override.split("=")
    node = compose("quickstart", [override]).tree
    for part in key.split("."):
        node = node[part]
    assert node == float(value)


@pytest.mark.parametrize(
    "override",
    [
        "method.sparsity=1", "method.sparsity=-0.1", "method.experts=0", "method.settle=1", "method.mask_lr=0",
        "method.router_temperature=[5,0]", "task.ways=[1,5]", "task.queries=0", "task.support=1",
        "task.test_episodes=1",
    ],
)  # fmt: skip
def test_a_number_of_few_shot_tasks_out_of_range(override):
    (mistake,) = found(*FEW_SHOT, override)
    assert mistake.where == f"override {override}"
    assert "expected" in mistake.what


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["data.streaming=true"], "data.streaming needs training.max_steps"),
        (["data.streaming=true", "training.max_steps=9", "training.group_by_length=true"], "do not go together"),
        (["data.where={train: mono}"], "names no column of a split"),
        (["data.where.train.cell=mono", "data.streaming=true", "training.max_steps=9"], "that are streamed are all"),
        (["data.source=files", "data.name=null"], "names no file of the train split"),
        (["data.files.train=a.csv"], "data.source is not files"),
        (["data.source=hub", "data.name=null"], "data.name is missing"),
        (["data.name=null"], "data.name is missing"),
        (["data.subset=main"], "only means something with data.source=hub"),
        (["data.validation_share=0.6", "data.test_share=0.5"], "leave no training rows"),
        (["model.name=''"], "model.name is empty"),
        (["model.weights=random", "model.source=hub", "~model.shape"], "needs the shape"),
        (["model.revision=main"], "only means something with model.source=hub"),
        (["~model.shape.model_type"], "no model_type"),
        (["model.quantization=nf4", "method=full"], "this method trains weights themselves"),
        (["model.quantization=int8", "method=sdt"], "this method trains weights themselves"),
        (["model.quantization=nf4", "method=lora", "method.init=pissa"], "method.init needs the weights' own numbers"),
        (["model.quantization=int8", "method=lora", "method.use_dora=true"], "does not train on matrices in int8"),
        (
            ["model.quantization=nf4", "method=peft", "method.type=LOHA"],
            "PEFT's LOHA does not train on matrices in nf4",
        ),
        (
            ["model.quantization=nf4", "method=peft", "method.type=LORA", "+method.args.init_lora_weights=olora"],
            "init_lora_weights=olora needs the weights' own numbers",
        ),
        (["method=linear_probe"], "linear_probe trains a linear head"),
        (["method=linear_probe", *GENERATION], "linear_probe trains a linear head"),
        (["method=sdt", "method.dropout=0.1", "method.lora_targets=[]"], "drops inputs of LoRA"),
        (["method=sdt", "method.selector=random", "method.states=auto"], "a score that means nothing there"),
        (["method=sdt", "method.channels=0.6", "method.pruned=0.5"], "more than all channels"),
        (["method=sdt", "method.warmup=1.0"], "method.warmup takes all steps"),
        (["method=sparse_adapter", "method.few=0.9", "method.final=0.2"], "leave no steps for the stage that prunes"),
        (["method=sparse_adapter", "method.wide=4", "method.sparsity=0.5"], "method.wide decides the sparsity"),
        (["method=sparse_adapter", "method.chosen=3", "method.few=0"], "method.few=0 leaves it no steps"),
        (["method=kpsvd", "method.energy=0.5"], "method.energy chooses ranks"),
        (["method=kpsvd", "method.budget=5000"], "method.budget chooses ranks"),
        (["method=kpsvd", "method.rank=auto", "method.min_rank=40"], "method.min_rank is larger"),
        (["method=kpsvd", "method.source=delta"], "where the fine-tuned model is"),
        (["method=kpsvd", "method.tuned=runs/full/model"], "only means something with method.source=delta"),
        (["method=rowcol", "method.rank=auto"], "by just one of them"),
        (["method=rowcol", "method.worth=sensitivity"], "method.worth says what a budget is spent on"),
        (["method=rowcol", "method.layout=halvit"], "method.layout is for method.mode=tie"),
        (["method=rowcol", "method.distill.weight=0"], "method.distill is for method.mode=compress and tie"),
        (["method=rowcol", "method.mode=compress"], "method.mode=compress has one target"),
        (["method=rowcol", "method.target.parameters=50%"], "method.target is for method.mode=compress"),
        (["method=rowcol", "method.prune=0.2"], "method.prune is for method.mode=compress"),
        ([*SMALLER, "method.basis=gradient"], "method.basis=gradient says what a core may learn"),
        ([*SMALLER, "model.quantization=nf4"], "method.mode=compress or tie makes other ones"),
        ([*SMALLER, "method.target.parameters=120%"], "above 0 and below 100%"),
        (["method=rowcol", "method.mode=compress", "method.target.size=50%"], "unknown target 'size'"),
        (["training.max_steps=0"], "only method.mode=compress of rowcol may take no step"),
        (["method=rowcol", "method.diagonal=true"], "method.diagonal is for method.mode=tie"),
        (["training.batch_size=8", "training.micro_batch_size=9"], "larger than training.batch_size"),
        (["training.early_stopping=2", "training.eval_every=end"], "needs measurements before the end"),
        ([*GENERATION, "task.best_metric=rouge_l", "task.generated_rows=0"], "generated rows"),
        ([*GENERATION, "task.best_metric=answer_accuracy"], "does not say what an answer is"),
        ([*GENERATION, "task.best_metric=accuracy"], "cannot be 'accuracy' for generation"),
        ([*GENERATION, "task.best_metric=rouge_l", "task.scoring=number"], "cannot be 'rouge_l' for generation"),
        ([*GENERATION, "task.answer='(.)'", "task.scoring=number"], "task.answer only means something with"),
        ([*GENERATION, "task.scoring=code"], "does not say what is run after a program"),
        ([*GENERATION, "task.tests='{tests}'"], "task.tests only means something"),
        ([*GENERATION, "task.scoring=code", "task.tests='assert True'"], "names no column"),
        ([*CODE, "task.best_metric=pass_at_10", "task.samples=5"], "pass@k for more programs than task.samples draws"),
        ([*CODE, "data.columns.cheks=test_list"], "data.columns.cheks is read by nothing"),
        ([*GENERATION, "task.databases=spider/database"], "task.databases only means something"),
        ([*GENERATION, "task.scoring=sql", "task.best_metric=execution_match"], "does not say where the databases are"),
        ([*GENERATION, "task.samples=5"], "draws several answers a row for pass@k"),
        ([*GENERATION, "task.samples=5", "task.beams=2"], "task.beams looks for the likeliest"),
        ([*GENERATION, "task.shots=2", "task.template=chat"], "not into a chat"),
        ([*GENERATION, "task.system=hello"], "only means something with task.template=chat"),
        ([*PICTURES, "data.streaming=true", "training.max_steps=9"], "data.streaming is for text"),
        ([*PICTURES, "training.batch_tokens=99"], "pictures and few-shot tasks have none"),
        ([*SEVERAL, "task.positive=cat"], "task.positive is for two labels of which a picture has one"),
        ([*SEVERAL, "task.balanced_sampling=true"], "task.balanced_sampling needs one label a picture"),
        ([*SEVERAL, "task.label_smoothing=0.1"], "task.label_smoothing needs one label a picture"),
        ([*PICTURES, "task.best_metric=exact_match"], "is for pictures with several labels"),
        ([*PICTURES, "task.best_metric=perplexity"], "cannot be 'perplexity' for images"),
        ([*PICTURES, "task.augment.crop=0"], "task.augment.crop is 0"),
        ([*FEW_SHOT, "~data.domains"], "data.domains names none"),
        (["+data.domains.a={source:sample,name:digits}"], "data.source is not domains"),
        ([*PICTURES, "task=episodes"], "go together: tasks are drawn from domains"),
        ([*FEW_SHOT, "data.rows.train=9"], "would leave classes of domains without any"),
        ([*FEW_SHOT, "task.ways=[9,5]"], "its least above its most"),
        ([*FEW_SHOT, "data.streaming=true", "training.max_steps=9"], "tasks are drawn from all rows"),
        ([*FEW_SHOT, "method=linear_probe"], "linear_probe trains a linear head"),
        ([*FEW_SHOT, "task.best_metric=auroc"], "cannot be 'auroc' for episodes"),
        (["method=smat"], "method smat learns to adapt to few-shot tasks"),
        ([*FEW_SHOT, "method.expert_choices=[4,0]"], "method.expert_choices is 0, expected 1 or more"),
        ([*FEW_SHOT, "method.sparsity_choices=[1.0]"], "method.sparsity_choices is 1.0"),
        ([*FEW_SHOT, "method.experts=auto", "method.expert_choices=[]"], "experts=auto has nothing to choose among"),
        ([*FEW_SHOT, "method.sparsity=auto", "method.sparsity_choices=[]"], "sparsity=auto has nothing to choose"),
        (["task.prompt=hello"], "names no column"),
        (["task.prompt='{text'"], "cannot be read"),
        ([*GENERATION, "task.answer='(['"], "not a regular expression"),
        ([*GENERATION, "task.answer='[0-9]+'"], "no group"),
        (["task.prompt='{} {text}'"], "braces without a name"),
        (["~data.columns.text", "data.columns.txt=body"], "data.columns.txt is read by nothing"),
        (["data.rows.trian=3"], "no split 'trian'"),
        (["data.splits.dev=x"], "no split 'dev'"),
        (["data.source=files", "data.files.train=3"], "expected a path or a list of paths"),
        (["data.source=files", "data.files.train=[]"], "names no file of the train split"),
        (["schema_version=99"], "this program reads version 1"),
        (["schema_version=0"], "this program reads version 1"),
        (["training.cache_features=true"], "training.cache_features is for pictures"),
        ([*PICTURES, "training.cache_features=true", "task.augment.flip=true"], "task.augment changes them each time"),
        ([*PICTURES, "training.cache_features=true", "launch.processes=2"], "is for one process"),
        ([*PICTURES, "training.cache_features=true", "launch=slurm", "launch.nodes=2"], "is for one process"),
        (["launch.strategy=fsdp"], "launch.strategy cuts the model up among processes, and there is one"),
        ([*FEW_SHOT, "method=rowcol", "method.mode=tie"], "compress and tie learn from the original's answers"),
        (["launch.offload=true"], "launch.offload sends parts of the model"),
        (["launch=fsdp", "model.quantization=nf4"], "weights in few bits are not cut up"),
        (["launch=deepspeed-zero2", "launch.device=cpu"], "DeepSpeed is for GPUs here"),
        (["launch=fsdp", "launch.processes=2", "method=full", "training.precision=fp16"], "fp16 scales the loss"),
        (["launch=slurm", "launch.gpus_per_node=8", "launch.processes=4"], "one worker for each GPU"),
        (["launch=slurm", "launch.gpus_per_node=8", "launch.device=cpu"], "launch.gpus_per_node asks for GPUs"),
        (["launch=slurm", "launch.gpu_type=a100"], "launch.gpu_type needs"),
        (["launch=slurm", "launch.at_once=4"], "launch.at_once is for"),
        (["launch=slurm", "launch.time=soon"], "launch.time is 'soon'"),
        (["launch=slurm", "launch.time=2m", "launch.warning=120"], "ends before launch.warning=120 seconds"),
        (["launch=slurm", "launch.mem=64GB"], "launch.mem is '64GB'"),
        (["launch=slurm", "launch.partition='gpu long'"], "launch.partition is 'gpu long'"),
        (["launch=slurm", "launch.options=[exclusive]"], "launch.options has 'exclusive'"),
        (["training.batch_tokens=99", "training.batch_size=4"], "both say how large a batch is"),
    ],
)
def test_values_that_do_not_go_together(overrides, what):
    mistakes = found(*overrides)
    assert any(what in mistake.what for mistake in mistakes), mistakes
    assert all(mistake.where for mistake in mistakes)


def test_every_rule_has_a_case_above():
    marks = test_values_that_do_not_go_together.pytestmark[0].args[1]
    untested = [rule.what for rule in rules.RULES if not any(what in rule.what for _, what in marks)]
    assert untested == []


def test_rules_and_ranges_read_keys_that_exist():
    from peftcli.config import catalog

    known = {key for task in TASKS.values() for key in schema_keys({"task": task, "launch": LAUNCHES["slurm"]})}
    known |= {"launch.world"}  # reckoned from several
    for name in catalog.methods():
        known |= set(schema_keys({"method": catalog.settings_class(name)}))
    assert {key for rule in rules.RULES for key in rule.reads} <= known
    assert {*rules.RANGES, *rules.AMOUNTS} <= known


def test_tokens_of_an_override_replace_rows_of_the_recipe():
    assert compose("quickstart", ["training.batch_tokens=512"]).config.training.batch_tokens == 512


def test_rows_of_an_override_do_not_lose_to_tokens_of_the_recipe_in_silence(tmp_path):
    recipe = tmp_path / "own.yaml"
    text = compose("quickstart").recipe_path.read_text()
    assert text.count("batch_size: 32") == 1
    recipe.write_text(text.replace("batch_size: 32", "batch_tokens: 512"))
    compose(str(recipe))
    (mistake,) = found("training.batch_size=4", recipe=str(recipe))
    assert "both say" in mistake.what
    compose(str(recipe), ["training.batch_size=4", "training.batch_tokens=null"])


def test_a_value_of_the_wrong_type_breaks_no_rule_besides():
    (mistake,) = found("data.streaming=true", "training.group_by_length=false", "training.max_steps=many")
    assert mistake.where == "override training.max_steps=many"


class TestPeft:
    """`method=peft`: types and arguments against the installed package's source, which is not imported."""

    @pytest.mark.parametrize("tuner", ["LORA", "lokr", "IA3", "ln_tuning", "SHIRA", "ADALORA"])
    def test_known_types_in_either_case(self, tuner):
        config = compose("quickstart", ["method=peft", f"method.type={tuner}"]).config
        assert config.method.type.upper() == tuner.upper()

    def test_every_type_of_the_installed_package_is_found(self):
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        theirs = {name.value if hasattr(name, "value") else str(name) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
        assert theirs - set(peft_types.arguments()) <= {"MIXED"} | _of_our_own()

    def test_arguments_are_those_of_the_dataclasses(self):
        from dataclasses import fields

        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
            key = getattr(name, "value", str(name))
            if key in peft_types.arguments():
                theirs = {item.name for item in fields(cls) if item.init}
                assert theirs - peft_types.OURS == set(peft_types.arguments()[key]), key

    def test_a_type_is_required(self):
        (mistake,) = found("method=peft")
        assert mistake.what == "method.type is missing"
        assert mistake.where == "override method=peft"
        assert {"LORA", "LOKR"} <= set(mistake.allowed)
        assert "method.type=" in mistake.hint

    def test_an_unknown_type(self):
        (mistake,) = found("method=peft", "method.type=LOKKR")
        assert mistake.nearest == "LOKR"
        assert mistake.where == "override method.type=LOKKR"

    def test_an_unknown_argument(self):
        (mistake,) = found("method=peft", "method.type=LOKR", "method.args.rr=8", "method.args.alpha=3")
        assert (mistake.nearest, mistake.where) == ("r", "override method.args.rr=8")
        assert "rank_dropout" in mistake.allowed

    def test_an_argument_that_we_fill_in(self):
        (mistake,) = found("method=peft", "method.type=LORA", "method.args.task_type=CAUSAL_LM")
        assert "filled in by this program" in mistake.what


def _of_our_own() -> set[str]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    return {str(name) for name in PEFT_TYPE_TO_CONFIG_MAPPING if name not in set(PeftType)}


def test_arguments_that_a_tuner_cannot_do_without_are_asked_for_before_anything_is_loaded():
    first, second = found("method=peft", "method.type=adaption_prompt")
    assert [m.what for m in (first, second)] == [
        f"PEFT's ADAPTION_PROMPT needs method.args.{name}" for name in ("adapter_len", "adapter_layers")
    ]
    assert first.where == "override method.type=adaption_prompt"
    for tuner, names in peft_types.NEEDED.items():
        assert set(names) <= peft_types.arguments()[tuner]
