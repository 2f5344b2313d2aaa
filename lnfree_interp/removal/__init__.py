"""The fine-tuning that removes norms."""
