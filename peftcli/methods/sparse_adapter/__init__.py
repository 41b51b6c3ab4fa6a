"""Bottleneck modules between the layers of a frozen model, made sparse while they are trained."""
