"""Measurements of tritune and of its peers. Not part of the package; see README.md beside this file."""
