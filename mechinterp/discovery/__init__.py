"""From scores to circuits, and from circuits to how good they are."""
