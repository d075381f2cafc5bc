"""Servers that change the model they send out, so that what clients share gives more away.

A server is a frozen dataclass on `Server`; its fields are its options. `tamper` returns the model that is sent out,
before any client computes a gradient; the attack of the same family reads the leak and nothing else. To add one: a file
here, one line in SERVERS, a configuration and a test. The command line takes names, options and help from there.
"""

from utils.registry import Registry

SERVERS = Registry(
    honest="attacks.malicious.server:Server",
    imprint="attacks.malicious.imprint_server:Imprint",
    trap_weights="attacks.malicious.imprint_server:TrapWeights",
    adapter_imprint="attacks.malicious.adapter_server:AdapterImprint",
    class_fishing="attacks.malicious.fishing_server:ClassFishing",
    feature_fishing="attacks.malicious.fishing_server:FeatureFishing",
)
