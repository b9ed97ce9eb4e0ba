"""Checkpoints of AdapterHub's library `adapters`: `adapter_config.json` and `adapter.safetensors`.

Each family of methods is read by one file of this folder; `bridge.py` puts them together, `export.py` writes, and
`reference.py` is run by the Python of an environment that has the library.
"""

from multitune.convert.adapterhub.bridge import import_adapterhub
from multitune.convert.adapterhub.export import export_adapterhub

__all__ = ["export_adapterhub", "import_adapterhub"]
