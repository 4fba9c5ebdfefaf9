"""What a message gives away, and what can be done about it."""
