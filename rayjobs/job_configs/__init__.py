"""The `Config` of each job, one file per job. Importing them imports neither PyTorch nor Ray, so that help is quick."""
