"""How weights change: parameter groups, AdamW, learning-rate schedules."""
