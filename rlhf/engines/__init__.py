"""Training and generation engines, and the objectives they optimise."""
