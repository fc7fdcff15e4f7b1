"""What a run would be, before it is: pipeline schedules as they would go. No torch."""
