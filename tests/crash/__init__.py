"""The crash test: anything of ours is killed at any moment, under load, and nothing may be lost, left, or invented."""
