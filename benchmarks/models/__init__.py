"""Full networks: speed and memory."""
