"""Base models: loading, the roles of their modules, precision, and logits at chosen positions."""
