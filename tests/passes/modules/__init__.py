"""Twins of `passes/modules`."""
