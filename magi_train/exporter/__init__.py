"""Export: a trained module as a file that serves. `export` writes it, `load` runs it."""

from magi_train.exporter.loaded import Loaded, load
from magi_train.exporter.settings import ExportConfig
from magi_train.exporter.write import export

__all__ = ["ExportConfig", "Loaded", "export", "load"]
