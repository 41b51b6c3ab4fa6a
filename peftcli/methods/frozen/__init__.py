"""Nothing trained: what the base can do as it is."""
