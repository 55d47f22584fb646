"""The shipped configurations, their data and the tiny base model, as package data."""
