"""How a run goes from arguments to a result."""
