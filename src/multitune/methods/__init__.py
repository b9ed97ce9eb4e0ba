"""Tuning methods, one file each. A file placed in this folder is found by itself: it needs no entry in a list."""

from multitune.methods.base import Method, Recipe, SiteMethod
from multitune.methods.combined import Combined, make_method
from multitune.methods.registry import get_method, method_names, register

__all__ = ["Combined", "Method", "Recipe", "SiteMethod", "get_method", "make_method", "method_names", "register"]
