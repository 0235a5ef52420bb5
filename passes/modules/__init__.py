"""What modular decomposition is made of: the modules found, how hard the loss presses on them, their bases and scores, and the published refit."""
