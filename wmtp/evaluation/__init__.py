"""How good a trained model is: programs that pass their tests, and losses."""
