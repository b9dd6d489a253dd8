"""The science: one module per system, pure torch and numpy. Nothing here knows TRL or touches a file."""
