"""The HTTP server. Nothing is imported here, so that settings can be read without loading it.

- `client`: the engine as the server sees it; `stub`: one that needs no model.
- `settings`: names, keys, limits.
- `app`: `create_app`, routes, the API document; `serve`: running and stopping it; `protocol`: limits of connections;
  `gateway`: keys and request ids; `context`: what endpoints share.
- `completions`, `chat_completions`, `native`, `tokens`, `status`: the endpoints.
- `schema`, `body`, `parameters`, `prompts`: requests; `generation`: running them; `events`, `replies`, `logprobs`,
  `errors`: answers; `metrics`.
"""
