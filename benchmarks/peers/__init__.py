"""The other side: what the best-known libraries do with the same rows. Runs in environments of its own, without tritune."""
