"""Regression on words: numbers of each word, read from the stream of a model."""
