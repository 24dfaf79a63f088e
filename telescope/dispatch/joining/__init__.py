"""Workers that join: they take a running sweep's trials from its database, from any machine."""
