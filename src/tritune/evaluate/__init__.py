"""Answers, scores, intervals, tests and caveats."""
