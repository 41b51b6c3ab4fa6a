"""Sparse meta-tuning: one shared change of the weights, and experts that are sparse masks over it."""
