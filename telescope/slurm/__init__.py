"""A SLURM job of a sweep or its target run: a header for each, and bash files for all."""
