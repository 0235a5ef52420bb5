"""What structured pruning is made of: groups, scores, amounts, compensation."""
