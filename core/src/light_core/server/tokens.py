"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from starlette.requests import Request
from starlette.responses import Response

from light_core.errors import RequestError
from light_core.server.chat_completions import read_conversation
from light_core.server.context import ServerContext
from light_core.server.events import encode
from light_core.server.schema import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

__all__ = ["detokenize", "tokenize"]


async def tokenize(context: ServerContext, http: Request) -> Response:
    """Token ids of a text or of a conversation."""
    request = await context.bodies.read(http, TokenizeRequest)
    context.served_name(request.model)
    card = context.require_ready()
    tokenizer = context.prompts.tokenizer
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    if request.prompt is not None:
        text, special = request.prompt, request.add_special_tokens is not False
        token_ids = await context.prompts.run(lambda: tokenizer.encode(text, special))
    else:
        prompt = await read_conversation(context, request, card.max_model_len)
        if prompt.lease is not None:
            prompt.lease.close()
        token_ids = prompt.token_ids
    answer = TokenizeResponse(count=len(token_ids), max_model_len=card.max_model_len, tokens=token_ids)
    if request.return_token_strs:
        answer.token_strs = [tokenizer.token_text(token) for token in token_ids]
    return Response(encode(answer), media_type="application/json")


async def detokenize(context: ServerContext, http: Request) -> Response:
    """The text of token ids, special tokens included."""
    request = await context.bodies.read(http, DetokenizeRequest)
    context.served_name(request.model)
    card = context.require_ready()
    tokenizer = context.prompts.tokenizer
    for token in request.tokens:
        if not 0 <= token < card.vocab_size:
            raise RequestError(f"tokens: token ids are whole numbers from 0 to {card.vocab_size - 1}, got {token!r:.50}", "tokens")
    text = await context.prompts.run(lambda: tokenizer.decode(request.tokens, skip_special_tokens=False))
    return Response(encode(DetokenizeResponse(prompt=text)), media_type="application/json")
