"""Our forward pass of the Mamba block against Transformers', and adapters on each of its sub-modules."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from peftcli.models import mamba_mixer

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
TUNERS = {
    "LORA": lambda t: peft.LoraConfig(r=4, target_modules=t, init_lora_weights=False),
    "DORA": lambda t: peft.LoraConfig(r=4, target_modules=t, use_dora=True, init_lora_weights=False),
    "LOKR": lambda t: peft.LoKrConfig(r=4, target_modules=t, init_weights=False),
    "LOHA": lambda t: peft.LoHaConfig(r=4, target_modules=t, init_weights=False),
    "ADALORA": lambda t: peft.AdaLoraConfig(target_modules=t, init_lora_weights=False, total_step=10),
    "OFT": lambda t: peft.OFTConfig(r=0, oft_block_size=4, target_modules=t, init_weights=False),
    "BOFT": lambda t: peft.BOFTConfig(boft_block_size=4, target_modules=t, init_weights=False),
    "IA3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=[], init_ia3_weights=False),
    "VERA": lambda t: peft.VeraConfig(r=4, target_modules=t, init_weights=False),
    "RANDLORA": lambda t: peft.RandLoraConfig(r=4, target_modules=t, init_weights=False),
    "HRA": lambda t: peft.HRAConfig(r=4, target_modules=t, init_weights=False),
    "FOURIERFT": lambda t: peft.FourierFTConfig(n_frequency=10, target_modules=t),
    "SHIRA": lambda t: peft.ShiraConfig(r=4, target_modules=t),
}
CONVOLUTION = {
    "LORA": lambda t: peft.LoraConfig(r=64, target_modules=t, init_lora_weights=False),
    "LOKR": TUNERS["LOKR"],
    "LOHA": TUNERS["LOHA"],
}


def build(**changes) -> MambaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 4, "time_step_rank": 8}
    return MambaForCausalLM(MambaConfig(**{**shape, **changes})).eval()


@pytest.fixture
def both() -> tuple[MambaForCausalLM, MambaForCausalLM]:
    theirs = build()
    ours = copy.deepcopy(theirs)
    assert mamba_mixer.install(ours) == 2
    return theirs, ours


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 19, dtype=torch.long)
    mask[1, 12:] = 0
    return {"input_ids": torch.randint(0, 97, (3, 19)), "attention_mask": mask}


@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_are_those_of_transformers(both, rows, training):
    for model in both:
        model.double().train(training)
    found = []
    for model in both:
        logits = model(**rows, use_cache=False).logits
        logits.square().sum().backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0])
    # Transformers computes exp(A_log), norms and the bias of the step in float32 even here.
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_transformers(both, rows):
    theirs, ours = both
    exact = theirs(**rows, use_cache=False).logits
    errors = []
    for model in (theirs.bfloat16(), ours.bfloat16()):
        errors.append((model(**rows, use_cache=False).logits.float() - exact).square().mean().sqrt().item())
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_it_generates_what_transformers_does(both, beams):
    prompt = torch.randint(0, 97, (2, 7))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "use_cache": True, "pad_token_id": 0}
    theirs, ours = (m.generate(prompt, attention_mask=mask, **settings).tolist() for m in both)
    assert ours == theirs


def test_a_prompt_in_two_parts_is_the_prompt(both, rows):
    ours, ids = both[1], rows["input_ids"]
    whole = ours(ids, use_cache=False).logits
    first = ours(ids[:, :8], use_cache=True)
    second = ours(ids[:, 8:], use_cache=True, cache_params=first.cache_params)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)


def test_a_channel_that_is_not_kept_gives_exactly_zero(both):
    mixer = both[1].backbone.layers[0].mixer
    keep_D = torch.ones(64, dtype=torch.bool)
    keep_D[[3, 17]] = False
    seen = {}

    def project(name, x):
        seen[name] = x
        return getattr(mixer, name)(x)

    mamba_mixer.mix(mixer, torch.randn(2, 9, 32), project=project, keep_D=keep_D)
    zero = (seen["out_proj"] == 0).all(dim=(0, 1))
    assert zero.nonzero().flatten().tolist() == [3, 17]


def gradients(model, rows) -> list[str]:
    """Trained tensors without any gradient after one training pass."""
    model.train()
    model(**rows, labels=rows["input_ids"], use_cache=False).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    return [n for n, p in trained.items() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("target", PROJECTIONS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_learns_on_every_projection(both, rows, tuner, target):
    assert gradients(get_peft_model(both[1], TUNERS[tuner]([target])), rows) == []


@pytest.mark.parametrize("tuner", CONVOLUTION)
def test_tuners_that_know_depthwise_convolutions_learn_on_it(both, rows, tuner):
    assert gradients(get_peft_model(both[1], CONVOLUTION[tuner](["conv1d"])), rows) == []


@pytest.mark.parametrize("target", ["out_proj", "conv1d"])
def test_the_refusal_is_lifted_here_only(both, target):
    theirs, ours = both
    with pytest.raises(ValueError, match="incompatible"):
        get_peft_model(theirs, CONVOLUTION["LORA"]([target]))
    get_peft_model(ours, CONVOLUTION["LORA"]([target]))


@pytest.mark.parametrize("target", PROJECTIONS)
def test_a_merged_adapter_answers_the_same_on_both_forward_passes(both, rows, target):
    theirs, ours = both
    adapted = get_peft_model(ours.double(), TUNERS["LORA"]([target])).eval()
    with torch.no_grad():
        before = adapted(**rows, use_cache=False).logits
        theirs.double().load_state_dict(adapted.merge_and_unload().state_dict())
        torch.testing.assert_close(theirs(**rows, use_cache=False).logits, before, rtol=1e-6, atol=1e-6)
