"""Turns a trained small model into a quantized, verified bundle."""
