"""The server: FedAvg, and a leak file of every update. It follows the protocol and keeps what it is sent."""

from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from federation.task import about, new_model
from leak_file import save

app = ServerApp()


class CuriousFedAvg(FedAvg):
    """FedAvg that writes leaks/round_R_client_C.safetensors: the weights it sent, those that came back, and what it
    told the client to do. about: the fields of leak_file.About."""

    def __init__(self, folder: Path, about: dict, **options):
        super().__init__(**options)
        self.folder, self.about, self.sent = folder, about, None

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid):
        self.sent = arrays.to_torch_state_dict()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        replies = list(replies)
        for reply in replies:
            if not reply.has_error():
                after = reply.content["arrays"].to_torch_state_dict()
                name = f"round_{server_round:03d}_client_{int(reply.content['metrics']['client'])}.safetensors"
                save(self.folder / name, before=self.sent, after=after, **self.about)
        return super().aggregate_train(server_round, replies)


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    folder = Path(config["leaks"])
    folder.mkdir(parents=True, exist_ok=True)
    clients = {"min_train_nodes": config["clients"], "min_available_nodes": config["clients"]}
    strategy = CuriousFedAvg(folder, about(config), fraction_evaluate=0.0, **clients)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(new_model(config).state_dict()), num_rounds=config["rounds"])
