"""The exception tree. A wrong setting in Python is a ValueError or TypeError of its Config instead.

MagiError (RuntimeError)
|-- CaptureError            a forced tier could not be reached
|-- PassError               a pass cannot do what its Config asks
|-- PlanMismatchError       ranks decided differently before training
|-- RemoteRankError         another rank failed, ended or stopped answering
|-- ReplicaMismatchError    ranks hold different weights
|-- SecondDerivativeError   a compiled graph was to be differentiated twice
|-- SettingError            a file, MAGI_SETTINGS or an option holds a wrong setting
|-- UnreducedGradientError  a gradient arrived that no collective covers
`-- ExportError             a model could not be exported, or an artifact not loaded
"""


class MagiError(RuntimeError):
    """Base of every error that magi-train raises on purpose."""


class CaptureError(MagiError):
    """The tier that the Config forces cannot be reached; the message names the user's line."""


class PassError(MagiError):
    """A pass cannot do what its Config asks for, for example a budget below the possible."""


class EagerOnlyError(PassError):
    """A graph would not train as the code that it was captured from; uncompiled, that trains."""

    ADVICE = "only Config(tier='eager') trains it as it is"


class PlanMismatchError(MagiError):
    """Ranks hold different models, settings or plans; going on would hang or train nonsense."""


class RemoteRankError(MagiError):
    """Another rank failed, ended early or stopped answering while this rank was waiting for it."""


class ReplicaMismatchError(MagiError):
    """The ranks' copies of a parameter are no longer the same; names the first and the ranks."""


class SecondDerivativeError(MagiError):
    """A gradient of a gradient was asked for of what is compiled."""


class SettingError(MagiError, ValueError):
    """A setting from a file, the environment or the command line is unknown or of a wrong type."""


class UnreducedGradientError(MagiError):
    """A parameter received a gradient outside the captured graph after the first step."""


class StaleShadowError(MagiError):
    """A weight was written where neither PyTorch nor magi-train could see it."""


class ExportError(MagiError):
    """A model could not be exported, or an exported file could not be loaded."""
