"""Training by the published two-stage recipe."""
