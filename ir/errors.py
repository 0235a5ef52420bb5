"""One family of errors. Each message says what, where, what was expected, what was got, and the way out."""

from __future__ import annotations


class FxpressError(Exception):
    """Base of every error fxpress raises on purpose."""


class CaptureError(FxpressError):
    """The model could not be captured into a graph."""


class VerifyError(FxpressError):
    """A program breaks an invariant of its stage."""


class EditError(FxpressError):
    """A graph edit was asked for that cannot be done."""


class FormatError(FxpressError):
    """A weight format cannot hold this tensor, or a payload does not fit its format."""


class PassError(FxpressError):
    """A pass could not run, or touched nothing."""


class SpecError(FxpressError):
    """A pass spec, recipe or option is unknown or malformed."""


class CalibrationError(FxpressError):
    """Calibration data is missing, empty, of the wrong shape, or not finite."""


class TrainingError(FxpressError):
    """Training data, targets or losses are missing, do not fit the model, or are not finite."""


class LowerError(FxpressError):
    """A target cannot lower the program."""


class ExportError(FxpressError):
    """An exported file failed its checks; nothing was left behind."""


class ArtifactError(FxpressError):
    """A saved artefact is missing, truncated, tampered with, or newer than this fxpress."""


class CheckpointError(FxpressError):
    """A resume checkpoint belongs to another model, recipe or calibration set."""


class AssetError(FxpressError):
    """A packaged model or data set could not be fetched or checked."""


class MissingExtraError(FxpressError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package {package!r}; install it with: pip install 'fxpress[{extra}]'")
