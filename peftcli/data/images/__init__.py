"""Pictures: read safely, changed at random, compared, shown."""
