"""What a trained model can do: text, and measures of it."""
