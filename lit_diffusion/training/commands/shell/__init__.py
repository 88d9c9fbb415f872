"""The command line itself: parsing, configs, choices, errors, output."""
