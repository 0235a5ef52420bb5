"""From compressed programs to something that runs: the reference, and the targets in the packages beside it."""

from .target import Lowered, LoweringReport, No, SiteLowering, Support, Target, Yes, target_named, target_names

__all__ = ["Lowered", "LoweringReport", "No", "SiteLowering", "Support", "Target", "Yes", "target_named", "target_names"]
