"""What other methods make of the same counts: the columns beside ours in a table."""
