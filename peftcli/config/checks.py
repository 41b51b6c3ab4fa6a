"""The named checks that stop a run which would succeed and be wrong: a name, and what it means that it failed."""

from __future__ import annotations

CHECKS = {
    "unknown-key": "A recipe, group file or override names a key that nothing reads.",
    "dead-target": "A target of the adapter matches no layer of the model.",
    "dead-adapter": "A trained tensor gets no gradient on a probe batch before the first step.",
    "no-trainable-tokens": "No token of the training rows is learnt: every label is masked.",
    "label-mismatch": "A class has no training row, or the test rows have a label that training has not.",
    "non-finite-loss": "The loss or a gradient became infinite or not a number.",
    "out-of-memory": "The machine has no more memory to give.",
    "frozen-moved": "A tensor that should stay as it was, or a BatchNorm statistic, has changed.",
    "base-mismatch": "The adapter was trained on another base than the one it is loaded on.",
    "adapter-keys": "The adapter's file lacks tensors of this model, or has tensors that belong nowhere.",
    "merge-drift": "The merged model answers differently from the unmerged one, beyond the tolerance.",
    "identity-start": "Before the first step the model with the adapter already differs from the base.",
    "unsafe-weights": "The weights are a pickle or want to run code of their own.",
}
