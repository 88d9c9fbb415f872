"""What `new` does: look at data, propose a recipe, write its config, try some steps."""
