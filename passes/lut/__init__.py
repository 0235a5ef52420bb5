"""Learned tables: one-dimensional clustering, what to keep apart, and refinement under a Gram."""
