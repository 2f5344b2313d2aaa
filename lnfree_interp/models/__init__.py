"""What a model is here: norm sites, the maps that stand at them, and exact folds."""
