"""Worked examples: models, data and training, each runnable from the command line."""
