"""One file per job: a `Config`, what it plans, and `run(config) -> dict`."""
