"""The offline demo: its images and text, the tiny models that are trained on them, and the settings of its jobs."""
