"""Text generation: rows of any mix of adapters and settings, decoded together, each as if alone."""

from multitune.generation.engine import Engine, Request
from multitune.generation.evaluation import TextEvaluation, Written, evaluate_texts
from multitune.generation.settings import Generation, GenerationSettings

__all__ = [
    "Engine",
    "Generation",
    "GenerationSettings",
    "Request",
    "TextEvaluation",
    "Written",
    "evaluate_texts",
]
