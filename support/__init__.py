"""What the six files at the top stand on; a first reader may skip it."""
import os

# How often a thread of GNU's OpenMP looks before it sleeps. By default two threads that wait for each other
# beside another busy program make everything tens of times slower; if they sleep at once, a small model is
# half as fast when nothing else runs. Read once, when torch loads its OpenMP: so every script imports this
# package before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "500")
