"""Finders: each recognises one kind of structure from operators, users and axes, never from names."""
