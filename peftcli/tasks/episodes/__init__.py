"""Few-shot tasks: a handful of labelled rows of each class, and others to be told apart."""
