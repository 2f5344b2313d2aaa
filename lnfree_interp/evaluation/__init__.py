"""Is the model still good, and is attribution now right?"""
