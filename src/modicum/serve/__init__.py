"""Serving: one base model, an adapter of its own for every request, one batch.

    api/          HTTP: the OpenAI routes, the admin's routes, the page; keys and limits are checked here
    experiments/  traffic between versions, what users thought of it, and when to stop
    engine/       tokens in, tokens out: continuous batching, the pool of adapters, the layers that read it

Requests go down, tokens come up. Only `engine/` knows torch.
"""
