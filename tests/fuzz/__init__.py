"""Every reader of what a user points at, on damaged and hostile inputs; `python -m tests.fuzz` runs many of them.

The property: a reader returns, or raises an error that a command reports in one message; within its limits of time and
memory; without a write outside its folder, a process, a connection, or a class looked up by a pickle.
"""
