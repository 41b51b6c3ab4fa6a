"""A tokenizer, a language model and splits small enough for a test."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, MambaForCausalLM

from peftcli.data.rows import Rows
from peftcli.models import mamba_mixer
from peftcli.testing.tiny import mamba_shape
from tests.tiny import build_llama, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def plain_tokenizer():
    """One without a chat template, for tests that change it."""
    return make_tokenizer(chat=None)


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Nothing is kept from test to test, except the samples for those that need them."""
    if "samples" not in request.keywords:
        monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_llama(tokenizer):
    """`build_llama` for the tokenizer's vocabulary."""
    return partial(build_llama, len(tokenizer))


@pytest.fixture
def llama(make_llama):
    return make_llama()


@pytest.fixture(params=["llama", "mamba"])
def pair(request, tokenizer, make_llama):
    """A model as this program runs it, and the same weights in Transformers' own class, in float32."""
    if request.param == "llama":
        ours = make_llama(dtype=torch.float32)
        theirs = LlamaForCausalLM(ours.config)
    else:
        torch.manual_seed(0)
        shape = mamba_shape(vocab_size=len(tokenizer), initializer_range=0.5, bos_token_id=None, eos_token_id=2)
        ours, theirs = MambaForCausalLM(shape).eval(), MambaForCausalLM(shape)
        mamba_mixer.install(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


@pytest.fixture
def splits():
    """A function from dictionaries to splits as the data room gives them."""

    def numbered(rows):
        return None if rows is None else Rows.from_list([{"row": i, **row} for i, row in enumerate(rows)])

    def build(train, validation=None, test=None):
        return SimpleNamespace(train=numbered(train), validation=numbered(validation), test=numbered(test))

    return build
