"""The run around the steps: set-up, loop, hooks, interruption, and the proofs that layouts and resumes agree."""
