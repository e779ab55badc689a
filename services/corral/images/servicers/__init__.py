"""The RPCs: each translates between wire types and the leaf's own, nothing else."""
