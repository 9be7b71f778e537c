"""OpenAI's API over HTTP in front of an engine, or of other servers, for tenants with adapters of their own.

`gateway` carries a request from its key to its last token, `http` speaks HTTP, and a `backend` makes the tokens.
"""
