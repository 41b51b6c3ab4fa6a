"""What a generated text is worth: one scorer a kind of answer, chosen by `task.scoring`."""
