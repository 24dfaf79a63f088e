"""The fit: priors, the model, its posterior, and its optimum."""
