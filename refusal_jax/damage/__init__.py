"""What removing a direction costs, at every strength and place."""
