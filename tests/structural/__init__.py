"""Models with real names and shapes and random weights, for tests."""
