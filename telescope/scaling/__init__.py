"""The scaling law of two optimizers, pure: laws fitted to losses and compute, and their ratio."""
