"""What exported policies are made of."""
