"""Orders of units in which every prefix is a good smaller layer."""
