"""Checkpoints of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Each family of methods is one file of this folder with one decorated class; the folder is scanned.
"""

from multitune.convert.peft.bridge import export_peft, import_peft
from multitune.convert.peft.family import Family, families, family_of_method, family_of_type

__all__ = ["Family", "export_peft", "families", "family_of_method", "family_of_type", "import_peft"]
