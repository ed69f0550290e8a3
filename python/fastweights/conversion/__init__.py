"""From a pretrained softmax transformer to one that is linear in its context."""

from fastweights.conversion.attention import LinearizedAttention, linearized_layers
from fastweights.conversion.features import HedgehogFeatures
from fastweights.conversion.linearize import linearize
from fastweights.conversion.perplexity import perplexity
from fastweights.conversion.persistence import load, save
from fastweights.conversion.recipes import RECIPES, Recipe
from fastweights.conversion.recover import recover
from fastweights.conversion.transfer import original_attention, transfer_attention

__all__ = [
    "RECIPES",
    "HedgehogFeatures",
    "LinearizedAttention",
    "Recipe",
    "linearize",
    "linearized_layers",
    "load",
    "original_attention",
    "perplexity",
    "recover",
    "save",
    "transfer_attention",
]
