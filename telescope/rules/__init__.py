"""Width rules: the role of each parameter, and how its settings follow the width."""
