"""Direct connections: HTTP/1.1 over asyncio's own transports, without httpx's layers.

httpx, httpcore and anyio take more than a millisecond of CPU for a request, and a training step is
a few small ones. What they do for an unencrypted connection to a service is here: keep-alive,
timeouts, and a well-kept parser (httptools). TLS, proxies, redirects, cookies and renewed tokens
stay httpx's: `Http.send` uses both. Responses, errors and timeouts are httpx's, and mean the same.
"""

FOLLOWING = "following"
"""Name under which a response's extensions have the future of the bytes that follow it.

They are empty if the connection broke. The future's cancellation closes the connection.
"""
