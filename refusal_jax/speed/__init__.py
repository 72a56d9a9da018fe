"""Times the parts of a study on this machine, and says how near each comes to what the machine can do."""
