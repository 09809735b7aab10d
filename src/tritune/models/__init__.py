"""Bases: finding, loading and running a pretrained decoder over packed rows, through one door for edits."""
