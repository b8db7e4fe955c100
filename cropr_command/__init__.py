"""The `cropr` command, up to the moment when its work begins: arguments are read without loading
torch."""
