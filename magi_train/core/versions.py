"""Versions of installed packages."""

from importlib import metadata


def installed(name: str) -> str | None:
    """Return a distribution's version, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def own() -> str:
    """Return our version; a checkout that is run where it lies has none, and says so."""
    return installed("magi-train") or "a checkout"
