"""Every weight trained: the bar for the others."""
