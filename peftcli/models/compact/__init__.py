"""Models of Transformers with some of their modules rebuilt smaller: what they are, how they are saved and read."""
