"""Shell completion through the shell's own protocol, as bash and zsh ask for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = "import sys; sys.argv[0] = 'peft'; from peftcli.cli.main import app; app(prog_name='peft')"


def complete(*words: str, cwd=None) -> list[str]:
    """What bash is offered for the last of the words."""
    environment = os.environ | {
        "_PEFT_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(("peft", *words)),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("conf",), {"config"}),
        (("train", "quick"), {"quickstart"}),
        (("train", "smollm2/r"), {"smollm2/reuters-r8_lora", "smollm2/reuters-r8_sparse_adapter"}),
        (("cp", "llama2-7b/gsm"), {f"llama2-7b/gsm8k_{method}" for method in ("kpsvd", "lora", "pissa", "rowcol")}),
        (("train", "quickstart", "optim.l"), {"optim.lr="}),
        (("train", "quickstart", "track"), {"tracker=", "tracker.name=", "tracker.project="}),
        (("train", "quickstart", "method=l"), {"method=lora", "method=linear_probe"}),
        (("train", "quickstart", "method", "=", "l"), {"lora", "linear_probe"}),
        (("train", "quickstart", "tracker", "="), {"none", "tensorboard", "wandb", "mlflow", "trackio"}),
        (("train", "quickstart", "training.precision=b"), {"training.precision=bf16"}),
        (("train", "quickstart", "training.keep_best="), {"training.keep_best=true", "training.keep_best=false"}),
        (("train", "quickstart", "seed=1", "task.head=li"), {"task.head=linear"}),
        (("ls", "ch"), {"checks"}),
    ],
)
def test_what_bash_is_offered(words, offered):
    assert set(complete(*words)) == offered


def test_keys_of_every_method_and_task_are_offered():
    offered = set(complete("train", "quickstart", ""))
    assert {"model=", "method.r=", "method.type=", "task.completion=", "task.head=", "seed=", "optim.lr="} <= offered


def test_files_and_their_own_groups_are_offered(tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "configs" / "method" / "own-special.yaml").write_text("")
    assert "mine.yaml" in complete("train", "m", cwd=tmp_path)
    assert complete("train", "mine.yaml", "method=own", cwd=tmp_path) == ["method=own-special"]
