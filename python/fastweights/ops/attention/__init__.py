"""Softmax attention over a window, alone or joined with linear attention (LoLCATs)."""
