"""Sparse dimension tuning of state-space models."""
