"""Sample requests: admission, streams, polls, the OpenAI surface."""
