"""What the six files at the top stand on; a first reader may skip it."""
import os

# Two threads that wait for each other by spinning are tens of times slower beside any other busy program.
# Read once, when torch loads its OpenMP: so every script imports this package before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
