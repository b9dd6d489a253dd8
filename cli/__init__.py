"""The door: turns words into a composed configuration and calls one function."""
