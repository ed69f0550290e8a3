"""Quantized weights: packed layout, quantizers, the quantized linear."""
