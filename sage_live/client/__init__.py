"""What a program that asks for inference holds: verbs, and behind them a gateway, or a control plane of its own.

``ask`` words a request as OpenAI's API has it; a :class:`~sage_live.client.asking.Transport` carries it (``http``:
to a server, ``inprocess``: to a service in this process) and its answer comes back as ``answers`` says. Requests live in
one event loop in a background thread (``loop``), whatever thread or loop they come from (``verbs``, ``aio``).
"""
