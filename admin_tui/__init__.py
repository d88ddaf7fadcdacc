"""What an operator's terminal sees: terminal capabilities today, the console's screens as they are built."""
