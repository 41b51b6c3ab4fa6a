"""What is learnt: how a row is encoded, what is lost on it, how it is measured and decoded."""
