"""The main demo: a small LLaVA forgets what pooling averages away, and Vision Remember reads it back."""
