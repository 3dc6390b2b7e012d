"""Samples changed at random while training: images, text, tables."""
