"""Pictures and the class or classes of each."""
