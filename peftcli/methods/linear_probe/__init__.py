"""A classification head on frozen features."""
