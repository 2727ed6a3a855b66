"""Models and hooks: the torch island. Knows no task, no graph, no method."""
