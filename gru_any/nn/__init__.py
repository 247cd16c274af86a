"""The layers that users call, and below them the recurrence over time."""
