"""Text -> packed blocks of tokens."""
