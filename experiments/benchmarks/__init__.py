"""What this code costs in time and memory, next to what others cost."""
