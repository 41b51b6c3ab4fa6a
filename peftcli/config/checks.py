"""The named checks that stop a run which would succeed and be wrong, or that cannot go on: a name, and its meaning."""

from __future__ import annotations

CHECKS = {
    "unknown-key": "A recipe, group file or override names a key that nothing reads.",
    "dead-target": "A target of the adapter matches no layer of the model.",
    "dead-adapter": "A trained tensor gets no gradient on a probe batch before the first step.",
    "no-trainable-tokens": "No token of the training rows is learnt: every label is masked.",
    "label-mismatch": "A class has no training row, or the test rows have a label that training has not.",
    "non-finite-loss": "The loss or a gradient became infinite or not a number.",
    "zero-gradient": "The gradient was exactly zero for several steps, so that nothing is learnt any more.",
    "out-of-memory": "The machine has no more memory to give.",
    "frozen-moved": "A tensor that should stay as it was, or a BatchNorm statistic, has changed.",
    "base-mismatch": "The adapter was trained on another base than the one it is loaded on.",
    "adapter-keys": "The adapter's file lacks tensors of this model, or has tensors that belong nowhere.",
    "merge-drift": "The merged model answers differently from the unmerged one, beyond the tolerance.",
    "export-drift": "ONNX Runtime answers differently from the model that was exported, or cannot run it.",
    "identity-start": "Before the first step the model with the adapter already differs from the base.",
    "unsafe-weights": "The weights are a pickle or want to run code of their own.",
    "data-changed": "A run is continued on other rows than those it began with.",
    "broken-checkpoint": "A file of a checkpoint is missing, truncated or damaged.",
    "damaged-file": "A file of a run folder is not what this program wrote.",
    "disk-full": "The disk had no room for a file; what was complete before is still there.",
    "write-failed": "The disk failed while a file was written; what was complete before is still there.",
    "lost-worker": "A worker process ended without a message, or was never started.",
    "rendezvous": "The launchers of a run on several nodes did not find each other.",
    "slurm-refused": "Slurm did not take a job, or did not answer; its own words are shown.",
    "requeues-used": "A job went back into the queue as often as launch.requeues allows.",
    "sample-archive": "A sample's download is damaged or lacks a file.",
    "sample-hash": "A sample's file is not the one that was pinned.",
    "sample-conversion": "A converted sample does not answer as its original does.",
    "unsafe-archive": "A sample's archive would write outside its folder, holds links, or unpacks to too much.",
}
