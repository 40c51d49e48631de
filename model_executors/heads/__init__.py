"""What turns the last state into logits."""
