"""How weights are perturbed and updated; torch only."""
