"""Experiment trackers: each behind a queue, in a process of its own that nothing waits for."""
