"""Kinds of tasks and where their rows come from. Text only."""
