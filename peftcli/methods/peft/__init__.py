"""Every tuner of Hugging Face PEFT, by its own name and arguments."""
