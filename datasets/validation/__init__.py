"""Checks of a dataset before training: START HERE at `run.validate`."""
