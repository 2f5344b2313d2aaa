"""Files <-> `HookedTransformer`."""
