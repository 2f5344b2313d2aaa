"""From text to sequences of tokens of one length."""
