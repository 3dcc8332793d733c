"""Transport: HTTP, credentials, futures, sessions, telemetry."""
