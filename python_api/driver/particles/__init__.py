"""The driver of particles (DESIGN 3.9): their state, what follows each position, and a run."""
