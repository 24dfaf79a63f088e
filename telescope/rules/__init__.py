"""Width rules: each parameter's role, and its settings at every width."""
