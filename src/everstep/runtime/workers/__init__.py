"""Workers as the runtime sees them: processes, eviction, memory."""
