"""Tuning methods, one file each. A file placed in this folder is found by itself: it needs no entry in a list."""

from multitune.methods.base import Method, Recipe, SiteMethod
from multitune.methods.registry import get_method, method_names, register

__all__ = ["Method", "Recipe", "SiteMethod", "get_method", "method_names", "register"]
