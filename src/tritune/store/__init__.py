"""Adaptations and other files on disk: whole or not at all, read strictly."""
