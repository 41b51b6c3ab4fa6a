"""Decoding in batches with a cache: beams equal Transformers' own a row at a time, draws hang on seed and row alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig as Generation

from peftcli.config.schema import GenerationConfig
from peftcli.tasks import registry
from peftcli.tasks.decoding import Chance

ROWS = [
    {"prompt": text, "completion": "good"}
    for text in ("how many apples are left?", "good", "The film was bad, the music", "a", "A stupid plot and")
]


def made(seed=0, **settings):
    return registry.build(GenerationConfig(max_new_tokens=8, **settings), seed)


def texts(task, model, tokenizer, batch_size=5):
    found = task.predict(model, ROWS, tokenizer, batch_size=batch_size, device="cpu")
    return [row["predicted"] for row in found]


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_with_a_cache_equal_transformers_a_row_at_a_time(pair, tokenizer, beams):
    model, other = pair
    end = tokenizer.eos_token_id
    settings = Generation(num_beams=beams, max_new_tokens=8, eos_token_id=end, pad_token_id=0, use_cache=False)
    alone = []
    for row in ROWS:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        out = other.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        alone.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    task = made(beams=beams)
    assert texts(task, model, tokenizer) == texts(task, model, tokenizer, 1) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_is_inherited_from_the_checkpoints_own_settings(llama, tokenizer, beams):
    plain = texts(made(beams=beams), llama, tokenizer)
    llama.generation_config.update(
        repetition_penalty=3.0, no_repeat_ngram_size=1, length_penalty=-5.0, suppress_tokens=list(range(5, 60))
    )
    own = llama.generation_config.to_dict()
    adapted = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    assert texts(made(beams=beams), llama, tokenizer) == texts(made(beams=beams), adapted, tokenizer) == plain
    assert llama.generation_config.to_dict() == adapted.generation_config.to_dict() == own


def test_drawn_answers_hang_on_seed_and_row_and_not_on_the_batch(pair, tokenizer):
    model, _ = pair
    task = made(samples=3, scoring="code", tests="{prompt}", temperature=1.5)
    together = texts(task, model, tokenizer, 15)
    assert [len(row) for row in together] == [3] * 5
    assert together == texts(task, model, tokenizer, 15) == texts(task, model, tokenizer, 2)
    assert len({text for row in together for text in row}) > 5
    assert together != texts(made(1, samples=3, scoring="code", tests="{prompt}", temperature=1.5), model, tokenizer)


def test_a_low_temperature_draws_the_likeliest(pair, tokenizer):
    model, _ = pair
    cold = texts(made(samples=2, scoring="code", tests="{prompt}", temperature=1e-4), model, tokenizer)
    assert cold == [[text] * 2 for text in texts(made(), model, tokenizer)]


def test_draws_follow_the_probabilities():
    scores_V = torch.tensor([2.0, 1.0, 0.0, float("-inf")])
    chance = Chance(list(range(4000)))
    counts = chance(torch.zeros(4000, 1), scores_V.expand(4000, 4)).argmax(1).bincount(minlength=4)
    assert (counts / 4000 - scores_V.softmax(0)).abs().max() < 0.025
    assert counts[3] == 0
