"""What a file's header tells, and how much memory its model takes; no weight is read."""
