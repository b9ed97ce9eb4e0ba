"""Checkpoints of AdapterHub's library `adapters`: `adapter_config.json` and `adapter.safetensors`, read.

Each family of methods is one file of this folder; `bridge.py` puts them together, and `reference.py` is run by the
Python of an environment that has the library.
"""

from multitune.convert.adapterhub.bridge import import_adapterhub

__all__ = ["import_adapterhub"]
