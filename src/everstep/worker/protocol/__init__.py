"""Messages between the runtime and its workers. No torch."""
