"""Processes, signals, files and memory: what the operating system provides."""
