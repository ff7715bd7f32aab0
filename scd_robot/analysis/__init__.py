"""What a trained policy does with its history."""
