"""What is trained: which parameters, and which of them matter."""
