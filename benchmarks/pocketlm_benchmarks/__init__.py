"""Measures a bundle on the device in front of you."""
