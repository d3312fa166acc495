"""Mutation testing: small faults put into the core's code, each of which some test should find."""
