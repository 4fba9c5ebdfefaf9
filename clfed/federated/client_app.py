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


@app.train("local")
def train(message: Message, context: Context) -> Message:
    """Train on this round's images as the method's own half says, and send what it sends."""
    return _answer("train", message, context)


@app.query("introduce")
def introduce(message: Message, context: Context) -> Message:
    """Say which node this is."""
    return _answer("introduce", message, context)


@app.query("score")
def score(message: Message, context: Context) -> Message:
    """Say how hard this round's images are for what the server sent."""
    return _answer("score", message, context)


@app.query("predict")
def predict(message: Message, context: Context) -> Message:
    """Answer test images with the node's own model."""
    return _answer("predict", message, context)


def take_part(message: Message, context: Context) -> Message:
    """Take one step of a masked sum."""
    return _answer(message.metadata.message_type.partition(".")[2], message, context)


# The names of clfed.privacy.secagg_messages.STEPS, which would import much.
for _step in ("secagg_keys", "secagg_shares", "secagg_masked", "secagg_unmask"):
    app.query(_step)(take_part)


def _answer(action: str, message: Message, context: Context) -> Message:
    reply = ask(action, message.content, context.node_config)
    if reply is None:
        from clfed.federated.answering import answer_alone

        reply = answer_alone(action, message.content, context)
    return Message(reply, reply_to=message)
