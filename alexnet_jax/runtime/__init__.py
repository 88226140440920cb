"""The process and the system that it runs on."""
