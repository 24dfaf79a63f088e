"""Compares optimizers over batch sizes: tokens to a loss, critical batches, devices; pure."""
