"""Our numbers against a plain loop over Transformers: one row at a time, no padding, none of this program's code."""

from __future__ import annotations

import math

import pytest
import torch

from peftcli.config.schema import GenerationConfig
from peftcli.tasks import registry

PROMPT = "Question: {prompt} Answer:"
ROWS = [
    ("how many apples are left?", "three apples"),
    ("was the film good?", "the music was bad and the plot was stupid #### 7"),
    ("a", "good"),
    ("how many stupid apples are wonderful, and how many of the wonderful cast are left?", "#### 3"),
    ("the music?", "bad"),
]


def learn(model, encodings):
    """A few steps, so that some rows are answered rightly."""
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(25):
        for prompt, answer in encodings[:3]:
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            model(ids, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()


@torch.no_grad()
def by_hand(model, tokenizer, encodings):
    """Perplexity a token over all rows, exact match, and the greedy texts, through the whole model at each step."""
    total, count, texts, same = 0.0, 0, [], 0
    for prompt, answer in encodings:
        log_LV = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        for place, token in enumerate(answer, start=len(prompt)):
            total -= log_LV[place - 1, token].item()
            count += 1
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (len(ids) == len(prompt) or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        texts.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
        same += texts[-1] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    return math.exp(total / count), same / len(encodings), texts


def test_perplexity_exact_match_and_texts_are_those_of_a_plain_loop(pair, tokenizer, splits):
    ours, theirs = pair
    encodings = [
        (tokenizer(PROMPT.format(prompt=prompt))["input_ids"], [*tokenizer(" " + answer)["input_ids"], 2])
        for prompt, answer in ROWS
    ]
    learn(theirs, encodings)
    ours.load_state_dict(theirs.state_dict())
    perplexity, exact_match, texts = by_hand(theirs, tokenizer, encodings)
    assert 0 < exact_match < 1
    config = GenerationConfig(prompt=PROMPT, completion=" {completion}", generated_rows=9, max_new_tokens=12)
    task = registry.build(config)
    encoded = task.encode_split(splits([{"prompt": p, "completion": a} for p, a in ROWS]).train, tokenizer)
    for batch_size in (1, 4):
        found = task.evaluate(ours, encoded, tokenizer, batch_size=batch_size, device="cpu", generate=True)
        assert found.metrics["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert found.metrics["exact_match"] == exact_match
        assert [example["predicted"] for example in found.examples] == texts
