"""Many runs of one recipe: which settings to take, and what cannot be told apart."""
