"""The Flower ClientApp of every node, simulated or real.

A real deployment starts one process for each message. So this module imports nothing heavy: where
the node's own long-lived process (``clfed join``) is there, the request is passed on to it.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clfed.federated.relay import ask

app = ClientApp()


@app.train()
def reconnoitre(message: Message, context: Context) -> Message:
    """Learn what this round brings and send the own rows that the server does not have yet."""
    return _answer("reconnoitre", message, context)


@app.query("merged")
def keep(message: Message, context: Context) -> Message:
    """Keep the merged memory that the server broadcasts, and say what it is."""
    return _answer("keep", message, context)


@app.train("finetune")
def finetune(message: Message, context: Context) -> Message:
    """Train the whole network on this round's images alone and send it back."""
    return _answer("finetune", message, context)


def _answer(action: str, message: Message, context: Context) -> Message:
    reply = ask(action, message.content, context.node_config)
    if reply is None:
        from clfed.federated.answering import answer_alone

        reply = answer_alone(action, message.content, context)
    return Message(reply, reply_to=message)
