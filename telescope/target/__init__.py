"""The large run with the transferred settings: several ranks, sharded state, checkpoints."""
