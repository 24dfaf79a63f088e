"""Scaling laws of optimizers, pure: laws fitted to loss and compute, and the FLOP ratio."""
