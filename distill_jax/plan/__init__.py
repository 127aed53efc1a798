"""What is known of a run before it is paid for."""
