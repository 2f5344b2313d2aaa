"""The architectures that vary norms: one call each."""
