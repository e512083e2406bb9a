"""Studies on top of the core: each answers a question about adapters on the user's own data."""
