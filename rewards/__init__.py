"""Rewards: what correct means, in code."""
