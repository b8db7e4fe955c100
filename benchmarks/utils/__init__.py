"""What every benchmark shares: where figures go, how time is taken, how curves are drawn."""
