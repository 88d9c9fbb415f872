"""The commands: one file each, by its name."""
