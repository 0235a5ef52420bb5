"""What the planner of factorizations is made of: ways to hold a weight, their errors and amounts, and how a choice is carried out."""
