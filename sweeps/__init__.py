"""Many runs: which ones a grid has, how they are done side by side, and which one is best."""
