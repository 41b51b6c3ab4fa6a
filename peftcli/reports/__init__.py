"""What a person reads of a run: the page and the closing table."""
