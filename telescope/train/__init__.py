"""Trains one trial: model, optimizer, data, loop. Needs torch, numpy and mup, nothing else."""
