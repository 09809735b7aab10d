"""The one training loop and what it needs to go on after a stop."""
