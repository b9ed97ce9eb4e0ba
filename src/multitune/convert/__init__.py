"""To and from other libraries' checkpoints; every conversion ends with a comparison of outputs."""

from multitune.convert.api import FORMATS, export_adapter, import_adapter
from multitune.convert.probe import Check
from multitune.convert.result import Exported, Imported

__all__ = ["FORMATS", "Check", "Exported", "Imported", "export_adapter", "import_adapter"]
