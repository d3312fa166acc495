"""The offline world of the demo: its text, and the tiny foundation models that are trained on it while you watch."""
