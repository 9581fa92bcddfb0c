"""Experiments: arms x tasks x seeds on a model, in a folder that a run goes on in, graded afterwards."""
