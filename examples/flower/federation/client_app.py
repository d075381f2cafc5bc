"""A client: it trains on images of its own folder, which never leaves it, and answers with its weights."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federation.task import local_batch, new_model, train

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    config, folder = context.run_config, context.node_config["images"]
    number = message.content["config"]["server-round"]
    model = new_model(config)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = local_batch(folder, number, config)
    loss = train(model, images, labels, number, folder, config)
    metrics = {"num-examples": len(images), "loss": loss, "client": context.node_config["client"]}
    reply = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(reply), reply_to=message)
