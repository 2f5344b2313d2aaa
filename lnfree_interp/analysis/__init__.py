"""Questions on a finished model."""
