"""The dispatcher on Ray: a session, the Tune experiment, the worker processes."""
