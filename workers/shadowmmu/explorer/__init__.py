"""Search over schedules: litmus tests, exploration, shrinking, attribution."""
