"""How a head makes one vector of a row's hidden states; apart from the heads, which need torch, for the settings."""

from typing import Literal

Pooling = Literal["cls", "mean", "pooler", "last"]
