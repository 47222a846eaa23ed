"""Text and tasks: haystacks, needles hidden in them, and the training mix. Imports nothing else of the package."""
