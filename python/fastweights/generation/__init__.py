"""Generation: prompts in parallel, tokens in steps, a state of constant size that can be kept."""

from fastweights.generation.engine import Engine, ModuleEngine
from fastweights.generation.loop import Generation, Piece, generate, load_state, prefill
from fastweights.generation.sampling import Sampler
from fastweights.generation.state import GenerationState

__all__ = [
    "Engine",
    "Generation",
    "GenerationState",
    "ModuleEngine",
    "Piece",
    "Sampler",
    "generate",
    "load_state",
    "prefill",
]
